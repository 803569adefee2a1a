"""DPO and its variants: pairs from rows, the step against an independent hand, resume, learning, real data."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, loaded, naive_logprobs, tiny
from torch import Tensor

import truecourse
from truecourse import Dpo, Lora, Recipe, RewardPart, Sampling
from truecourse import recipe as recipes
from truecourse.data import pairs
from truecourse.data.pairs import TokenPair
from truecourse.data.sources import Row, read
from truecourse.data.split import split
from truecourse.errors import UserError
from truecourse.methods.dpo import DPO, VARIANTS, _batch, resolve
from truecourse.model.policy import Policy
from truecourse.run.directory import RunDirectory

close = torch.testing.assert_close


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row(v, f"data.jsonl:{i}") for i, v in enumerate(values, 1)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# -- pairs from rows --------------------------------------------------------------------------------------------------

ASKED, OSLO, BERGEN = [user("Capital of Norway?")], [says("Oslo.")], [says("Bergen.")]
CHAT = (ASKED, OSLO, BERGEN)
FORMS: list[tuple[dict[str, Any], tuple[Any, Any, Any]]] = [
    ({"prompt": "Q: capital?", "chosen": " Oslo.", "rejected": " Bergen."}, ("Q: capital?", " Oslo.", " Bergen.")),
    ({"prompt": ASKED, "chosen": OSLO, "rejected": BERGEN}, CHAT),
    ({"prompt": ASKED, "chosen": "Oslo.", "rejected": "Bergen."}, CHAT),
    ({"prompt": "Capital of Norway?", "chosen": OSLO, "rejected": BERGEN}, CHAT),
    # whole conversations; UltraFeedback repeats their first turn as the prompt
    ({"chosen": ASKED + OSLO, "rejected": ASKED + BERGEN}, CHAT),
    ({"prompt": "Capital of Norway?", "chosen": ASKED + OSLO, "rejected": ASKED + BERGEN}, CHAT),
    # whole texts
    ({"chosen": "Q: capital? It is Oslo.", "rejected": "Q: capital? It is Odda."},
     ("Q: capital? It is", " Oslo.", " Odda.")),
    ({"chosen": "Q: capital?\nOslo.", "rejected": "Q: capital?\nOslo. Or not."},
     ("Q: capital?", "\nOslo.", "\nOslo. Or not.")),
]  # fmt: skip


@pytest.mark.parametrize(("values", "want"), FORMS)
def test_forms_of_a_comparison(values: dict[str, Any], want: tuple[Any, Any, Any]) -> None:
    rows, problems = pairs.comparisons(rows_of({"answer": "x", **values}))
    assert not problems
    assert [tuple(p) for p in pairs.pairs(rows)] == [(*want, "data.jsonl:1")]
    assert rows[0].values["answer"] == "x"


def test_the_prompt_of_a_transcript_ends_where_prompt_end_last_stands() -> None:
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows, problems = pairs.comparisons(
        rows_of({"chosen": head + " I know d", "rejected": head + " I know e"}), "\n\nAssistant:"
    )
    assert not problems
    assert tuple(pairs.pairs(rows)[0])[:3] == (head, " I know d", " I know e")


def test_plain_pairs_become_chats_on_request() -> None:
    rows, _ = pairs.comparisons(rows_of({"prompt": "Capital of Norway?", "chosen": "Oslo.", "rejected": "Bergen."}))
    assert tuple(pairs.pairs(rows, chat=True)[0])[:3] == CHAT


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are identical"),
    ({"chosen": ASKED + OSLO, "rejected": ASKED + OSLO}, "chosen and rejected are identical"),
    ({"chosen": "p a", "rejected": "p a"}, "chosen and rejected are identical"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "rejected is empty"),
    ({"prompt": ASKED, "chosen": [says(" ")], "rejected": OSLO}, "chosen is empty"),
    ({"chosen": "p:", "rejected": "p: "}, "the prompt is not shared"),
    ({"prompt": "p", "chosen": "a"}, "rejected is missing"),
    ({"prompt": "p", "chosen": None, "rejected": "a"}, "chosen is missing"),
    ({"chosen": "x y", "rejected": "z y"}, "the prompt is not shared"),
    ({"chosen": [user("a"), *OSLO], "rejected": [user("b"), *OSLO]}, "the prompt is not shared"),
    ({"chosen": [*ASKED, *OSLO, *ASKED, *OSLO], "rejected": ASKED + BERGEN}, "the prompt is not shared"),
    ({"chosen": OSLO, "rejected": BERGEN}, "the prompt is missing"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is missing"),
    ({"prompt": ASKED + OSLO, "chosen": "a", "rejected": "b"}, "the prompt ends with an assistant turn"),
    ({"prompt": ASKED, "chosen": ASKED + OSLO, "rejected": BERGEN}, "chosen is not one assistant turn"),
    ({"prompt": "p", "chosen": "a", "rejected": OSLO}, "one of chosen and rejected is text and the other a chat"),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen is neither text nor a chat"),
]
FINE = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(("values", "reason"), BAD, ids=[f"{i}: {reason}" for i, (_, reason) in enumerate(BAD)])
def test_malformed_pairs_are_named_by_their_line(values: dict[str, Any], reason: str) -> None:
    rows, (problem,) = pairs.comparisons(rows_of(FINE, values, FINE))
    assert [row.where for row in rows] == ["data.jsonl:1", "data.jsonl:3"]
    assert problem.where == "data.jsonl:2" and reason in problem.reason


def test_transcripts_whose_prompts_differ_are_malformed() -> None:
    end = "\n\nAssistant:"
    rows, problems = pairs.comparisons(
        rows_of(
            {"chosen": f"H: x{end} a", "rejected": f"H: y{end} b"},
            {"chosen": f"H: x{end} a{end} c", "rejected": f"H: x{end} b"},
            {"chosen": f"H: x{end} a", "rejected": "H: x"},
            {"chosen": f"H: x{end}", "rejected": f"H: x{end} b"},
        ),
        end,
    )
    assert not rows
    assert [p.reason for p in problems] == [
        "the prompt is not shared", "the prompt is not shared", "prompt_end does not occur in both texts",
        "chosen is empty",
    ]  # fmt: skip


def test_all_places_are_listed_and_skipping_is_told() -> None:
    _, problems = pairs.comparisons(rows_of(FINE, *[v for v, _ in BAD[:5]], FINE))
    told = pairs.settle(problems, "skip", "bad_pairs", 7)
    assert told == (
        "5 of 7 pairs are skipped (bad_pairs): chosen and rejected are identical: data.jsonl:2, 3, 4; "
        "rejected is empty: data.jsonl:5; chosen is empty: data.jsonl:6"
    )
    with pytest.raises(UserError, match=r'identical: data\.jsonl:2, 3, 4; .* or set bad_pairs = "skip"'):
        pairs.settle(problems, "refuse", "bad_pairs", 7)
    assert pairs.settle([], "refuse", "bad_pairs", 7) == ""


def test_pairs_of_one_prompt_stay_on_one_side_of_a_split() -> None:
    texts = [{"chosen": f"Q{i // 2} ? a{i}", "rejected": f"Q{i // 2} ? b{i}"} for i in range(40)]
    train, held = split(pairs.comparisons(rows_of(*texts))[0], 0.3)
    assert not {r.values["prompt"] for r in train} & {r.values["prompt"] for r in held}


def test_the_lab_has_right_and_wrong_sums() -> None:
    for name, of, count in (("sums-pairs", "sums", 7600), ("sums-pairs-held-out", "sums-held-out", 500)):
        rows, problems = pairs.comparisons(read(f"lab:{name}", Path()))
        assert not problems and len(rows) == count
        assert [r.values["prompt"] for r in rows] == [r.values["prompt"] for r in read(f"lab:{of}", Path())]
        off = set()
        for prompt, chosen, rejected, _ in pairs.pairs(rows):
            a, b = map(int, prompt[0]["content"].rstrip("=").split("+"))  # type: ignore[index]
            assert chosen == [says(str(a + b))]
            off.add(int(rejected[0]["content"]) - a - b)  # type: ignore[index]
        assert off == {-20, -10, -2, -1, 1, 2, 10, 20}


# -- one step ---------------------------------------------------------------------------------------------------------


def some_pairs(count: int = 9) -> list[TokenPair]:
    g = torch.Generator().manual_seed(3)
    tokens = lambda n: tuple(torch.randint(VOCABULARY, (n,), generator=g).tolist())  # noqa: E731
    return [TokenPair(tokens(1 + i % 5), tokens(1 + (3 * i) % 7), tokens(8 - i % 8)) for i in range(count)]


def method(
    model: str = "llama", *, shift: float = 0.0, micro_tokens: int = 8192, held_out: int = 3, **settings: Any
) -> DPO:
    """A method over a tiny random model. `shift` moves the policy's weights away from the reference's."""
    net = tiny(model)
    config = resolve(Dpo(data="x", **({"batch_size": 6} | settings)))
    kind: Any = {"auto": "copy", "stored": "none"}.get(config.reference or "", config.reference)
    policy = Policy(loaded(net), reference=kind, micro_tokens=micro_tokens)
    made = DPO(config, policy, some_pairs(), some_pairs(held_out), 0)
    if config.reference == "stored":
        made.evaluate()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(shift * torch.randn(p.shape, generator=draw))
    return made


def quiet(text: str) -> None:
    pass


def step_and_gradient(made: DPO, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Tensor]:
    """The record of a step that does not move the weights, and its gradient."""
    found: list[Tensor] = []

    def hold(lr: float) -> float:
        found.append(torch.cat([p.grad.flatten() for p in made.policy.model.parameters()]))
        made.policy.model.zero_grad()
        return float(found[0].norm())

    monkeypatch.setattr(made.policy, "step", hold)
    return made.step(1, 0.0, quiet).record, found[0]


def by_hand(made: DPO, rows: list[TokenPair]) -> tuple[Tensor, dict[str, float]]:
    """Loss and measures by naive log-probs and the papers' formulas, one pair at a time."""
    v, net, total = made.values, made.policy.model, torch.zeros(())
    own = net.config._attn_implementation
    seen: dict[str, list[float]] = {}
    for pair in rows:
        batch = _batch([pair])
        score = []
        for model, grad in ((net, True), (made.policy._reference, False)):
            if model is None:
                assert v.reference == "none"
                score.append((torch.zeros(()), torch.zeros(())))
                continue
            model.set_attn_implementation("eager")
            with torch.set_grad_enabled(grad):
                logp_T = naive_logprobs(model, batch)[0]
            score.append(logp_T.split(batch.lengths_N))
            model.set_attn_implementation(own)
        (w, l), (w_ref, l_ref) = score
        s_w, s_l = w.sum() - w_ref.sum(), l.sum() - l_ref.sum()
        if v.length == "mean":
            s_w, s_l = s_w / len(w), s_l / len(l)
        m, e = v.beta * (s_w - s_l), v.label_smoothing
        if v.loss == "square":
            loss = (s_w - s_l - 1 / (2 * v.beta)) ** 2
        elif v.loss == "hinge":
            loss = (1 - m).clamp(min=0)
        else:
            p = torch.sigmoid(m - v.target_margin)
            loss = -(1 - e) * p.log() - (-1 if v.robust else 1) * e * (1 - p).log()
            loss = loss / (1 - 2 * e) if v.robust else loss
        total = total + loss / len(rows)
        measures = {
            "loss": loss, "pairs/accuracy": (m > 0).float(), "reward/chosen": v.beta * s_w,
            "reward/rejected": v.beta * s_l, "reward/margin": m, "logp/chosen": w.sum(), "logp/rejected": l.sum(),
        }  # fmt: skip
        for name, value in measures.items():
            seen.setdefault(name, []).append(value.item())
    return total, {name: sum(values) / len(rows) for name, values in seen.items()}


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_naive_log_probs_and_the_papers_formulas(
    variant: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = method(model, variant=variant, shift=0.02)
    record, got = step_and_gradient(made, monkeypatch)
    from truecourse.data.order import take

    total, want = by_hand(made, [made.pairs[i] for i in take(0, 6, 9, 0)])
    total.backward()
    gradient = torch.cat([p.grad.flatten() for p in made.policy.model.parameters()])
    assert gradient.norm() > 1e-2 and (got - gradient).norm() <= 2e-5 * gradient.norm()
    for name, value in want.items():
        assert record[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    held = made.evaluate()
    for name, value in by_hand(made, made.held_out)[1].items():
        assert held[f"{name}/held_out"] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_do_not_depend_on_micro_batches(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for micro_tokens in (8192, 40, 30, 1):
        made = method(variant=variant, shift=0.02, micro_tokens=micro_tokens)
        parts = made.policy.micro_batches(_batch(some_pairs(6)), unit=2)
        assert all(len(part.batch.completions) % 2 == 0 for part in parts), "a pair stays together"
        assert len(parts) == {8192: 1, 40: 2, 30: 3, 1: 6}[micro_tokens]
        results.append(step_and_gradient(made, monkeypatch))
    (record, want), *others = results
    for other, got in others:
        assert (got - want).norm() <= 1e-5 * want.norm()
        for name in record:
            if not name.startswith("time/"):
                assert other[name] == pytest.approx(record[name], rel=1e-4, abs=1e-5), name


def test_a_pair_cut_apart_would_be_noticed() -> None:
    made = method(micro_tokens=1)
    parts = made.policy.micro_batches(_batch(some_pairs(6)))
    assert any(len(part.batch.completions) % 2 for part in parts)


def test_stored_log_probs_are_the_live_references() -> None:
    """Several updates with both: the same records, and the same weights in the end."""
    live, stored = method(lr=1e-3), method(lr=1e-3, reference="stored")
    assert stored.policy._reference is None
    for step in range(1, 6):
        a, b = (made.step(step, 1e-3, quiet).record for made in (live, stored))
        for name in a:
            if not name.startswith("time/"):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=2e-5), name
    assert a["reward/margin"] > 0.05
    for p, q in zip(live.policy.model.parameters(), stored.policy.model.parameters(), strict=True):
        close(p, q, atol=1e-4, rtol=1e-4)
    assert live.evaluate() == pytest.approx(stored.evaluate(), rel=1e-4, abs=2e-5)


def test_what_is_stored_survives_json_to_the_bit() -> None:
    first = method(reference="stored")
    state = json.loads(json.dumps(first.state()))
    second = method(reference="stored", shift=0.05)
    second.load_state(state)
    assert second.stored == first.stored
    rows = [4, 0, 7]
    batch = _batch([first.pairs[i] for i in rows])
    close(first._reference(batch, "train", rows), first._score(batch), atol=1e-5, rtol=1e-5)
    assert torch.equal(second._reference(batch, "train", rows), first._reference(batch, "train", rows))  # type: ignore[arg-type]
    other = method(reference="stored", held_out=4)
    with pytest.raises(UserError, match="no longer what this run began with"):
        other.load_state(state)


def test_a_policy_that_is_its_reference_has_no_margin() -> None:
    held = method().evaluate()
    assert held["loss/held_out"] == pytest.approx(math.log(2))
    assert (held["pairs/accuracy/held_out"], held["reward/margin/held_out"]) == (0.5, 0.0)
    assert method(held_out=0).evaluate() == {}


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta = 0 makes every reward 0"),
        ({"label_smoothing": 0.5}, "must be below 0.5"),
        ({"variant": "ipo", "label_smoothing": 0.1}, 'belongs to loss = "sigmoid"'),
        ({"variant": "cdpo", "loss": "hinge"}, 'belongs to loss = "sigmoid"'),
        ({"variant": "simpo", "loss": "square"}, "leave target_margin out"),
        ({"robust": True}, "needs label_smoothing"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    stage = Dpo(data="x", **settings)
    with pytest.raises(UserError, match=message):
        stage.check()
        resolve(stage)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resolved_stage_is_read_back_the_same(variant: str) -> None:
    recipe = Recipe(stage=(resolve(Dpo(data="x", variant=variant, prompt_end="\n\nA:")),))  # type: ignore[arg-type]
    assert recipes.from_table(recipes.to_table(recipe)) == recipe
    assert resolve(recipe.stage[0]) == recipe.stage[0]  # type: ignore[arg-type]
    assert None not in recipes.to_table(recipe)["stage"][0].values()


# -- whole runs -------------------------------------------------------------------------------------------------------

EXACT = (RewardPart(use="exact", name="correct"),)
SUMS: dict[str, Any] = {
    "data": "lab:sums-pairs", "held_out": "lab:sums-pairs-held-out", "gold": EXACT, "gold_prompts": 500,
    "gold_sampling": Sampling(temperature=0.0, max_tokens=8), "lr": 1e-3, "beta": 0.5,
}  # fmt: skip


def train(out: Path, seed: int = 0, lora: Lora | None = None, **settings: Any) -> RunDirectory:
    stage = Dpo(**(SUMS | settings))
    return RunDirectory.open(
        truecourse.train(Recipe(out=str(out), device="cpu", seed=seed, lora=lora, stage=(stage,)), quiet=True).path
    )


def same_records(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    costs = ("time/", "memory/", "tokens/per_second")
    strip = lambda records: [{k: v for k, v in r.items() if not k.startswith(costs)} for r in records]  # noqa: E731
    assert strip(a) == strip(b)


@pytest.mark.parametrize(
    "settings",
    [{}, {"reference": "stored"}, {"lora": Lora(rank=4, dropout=0.2)}, {"variant": "simpo", "beta": 2.0}],
    ids=["copy", "stored", "adapter_off", "none"],
)
def test_a_broken_run_resumes_to_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    short: dict[str, Any] = {
        "steps": 7, "checkpoint_every": 3, "gold_every": 4, "gold_prompts": 8, "batch_size": 8,
        "data": "lab:sums-pairs-held-out", "held_out": 40,
    }  # fmt: skip
    whole = train(tmp_path / "whole", **short, **settings)
    with monkeypatch.context() as patch:
        own = DPO.step

        def breaks(self: DPO, step: int, *rest: Any) -> Any:
            if step == 6:
                raise KeyboardInterrupt
            return own(self, step, *rest)

        patch.setattr(DPO, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", **short, **settings)
    broken = RunDirectory.open(tmp_path / "broken")
    assert [r["step"] for r in broken.metrics()] == [1, 2, 3, 4, 5]
    truecourse.resume(tmp_path / "broken", quiet=True)
    same_records(whole.metrics(), broken.metrics())
    same_records(whole.evals(), broken.evals())
    for file in sorted((whole.path / "checkpoints" / "step-7").rglob("*.safetensors")):
        a, b = load_file(file), load_file(broken.path / file.relative_to(whole.path))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file.name
    final = whole.evals()[-1]
    for name in ("loss", "pairs/accuracy", "reward/margin", "reward/chosen", "reward/rejected"):
        assert math.isfinite(final[f"{name}/held_out"])


def test_the_adapter_off_stored_and_a_copy_are_one_reference(tmp_path: Path) -> None:
    short: dict[str, Any] = {"steps": 4, "gold": (), "batch_size": 8, "lr": 1e-2, "lora": Lora(rank=4)}
    short |= {"data": "lab:sums-pairs-held-out", "held_out": 40}
    runs = [train(tmp_path / kind, **short, reference=kind) for kind in ("adapter_off", "stored", "copy")]
    first, *others = [run.metrics()[-1] for run in runs]
    assert abs(first["reward/margin"]) > 1e-3
    for other in others:
        for name in ("loss", "reward/chosen", "reward/rejected", "logp/chosen"):
            assert other[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name


def test_bad_and_long_pairs_stop_the_run_or_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(30)]
    lines = [*good, good[0] | {"rejected": "1"}, good[1] | {"chosen": ""}, good[2] | {"chosen": "9" * 600}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    short: dict[str, Any] = {
        "data": str(tmp_path / "d.jsonl"), "held_out": 0, "gold": (), "steps": 1, "batch_size": 4,
    }  # fmt: skip
    with pytest.raises(UserError, match=r'identical: d\.jsonl:31; chosen is empty: d\.jsonl:32\..* bad_pairs = "skip"'):
        train(tmp_path / "a", **short)
    with pytest.raises(UserError, match=r'longer than 512 tokens: d\.jsonl:33\..* long_pairs = "skip"'):
        train(tmp_path / "b", **short, bad_pairs="skip")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    stage = Dpo(**(SUMS | short), bad_pairs="skip", long_pairs="skip")
    truecourse.train(Recipe(out=str(tmp_path / "c"), device="cpu", stage=(stage,)))
    told = " ".join(capsys.readouterr().err.split())
    assert "2 of 33 pairs are skipped (bad_pairs)" in told and "d.jsonl:31" in told and "d.jsonl:32" in told
    assert "1 of 31 pairs are skipped (long_pairs): longer than 512 tokens: d.jsonl:33" in told
    all_bad = dataclasses.replace(stage, data=str(tmp_path / "e.jsonl"))
    (tmp_path / "e.jsonl").write_text(json.dumps(lines[30]))
    with pytest.raises(UserError, match=r"no pair is left: 1 of 1"):
        truecourse.train(Recipe(out=str(tmp_path / "d"), device="cpu", stage=(all_bad,)))
    with pytest.raises(UserError, match="dpo needs `chosen` and `rejected`"):
        train(tmp_path / "f", data="lab:sums", steps=1)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_likelihood_displacement_shows(tmp_path: Path) -> None:
    """A hot run from the shipped model tells held-out pairs apart while the right answers lose probability."""
    few: dict[str, Any] = {"data": "lab:sums-pairs-held-out", "held_out": 100}
    first, last = train(tmp_path / "run", steps=60, gold_every=60, gold=(), beta=0.1, **few).evals()
    assert last["pairs/accuracy/held_out"] > 0.65
    assert last["logp/chosen/held_out"] < first["logp/chosen/held_out"] - 0.5
    assert last["logp/rejected/held_out"] < last["logp/chosen/held_out"] - 2
    assert last["reward/chosen/held_out"] < 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_sums_from_pairs(seed: int, tmp_path: Path) -> None:
    """From 40 % of held-out sums right, greedily, to 60 % and more; about 20 CPU-seconds a seed."""
    first, last = train(tmp_path / "run", seed, steps=300, gold_every=300).evals()
    assert first["gold/correct"] == pytest.approx(0.4)
    assert last["gold/correct"] >= 0.6
    assert last["pairs/accuracy/held_out"] >= 0.9


# -- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("model", "rows"), [("tiny", 720), ("stories260K", 460)])
def test_hh_rlhf_end_to_end(
    model: str, rows: int, tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many comparisons as give about 300 that fit 512 tokens: bytes in the tiny model, which never saw text, and
    a learned vocabulary in a model of children's stories. Nothing of them is printed."""
    source = shared_data / "hh-rlhf" / "harmless-base.test.jsonl.gz"
    lines = gzip.decompress(source.read_bytes()).splitlines()[:rows]
    (tmp_path / "hh.jsonl").write_bytes(b"\n".join(lines))
    bad = [n for n in (87, 517) if n <= rows]
    settings: dict[str, Any] = {
        "data": str(tmp_path / "hh.jsonl"), "held_out": 0.1, "gold": (), "steps": 30, "batch_size": 32, "lr": 3e-5,
        "beta": 0.1, "gold_every": 10, "prompt_end": "\n\nAssistant:", "micro_tokens": 2048, "reference": "stored",
    }  # fmt: skip
    places = ", ".join(map(str, bad))
    with pytest.raises(UserError, match=rf"{len(bad)} of {rows} pairs .*: chosen is empty: hh\.jsonl:{places}\. Mend"):
        train(tmp_path / "refused", **settings)
    capsys.readouterr()
    stage = Dpo(**(SUMS | settings), bad_pairs="skip", long_pairs="skip")
    source_model = "tiny" if model == "tiny" else str(shared_data / model)
    run = truecourse.train(Recipe(model=source_model, out=str(tmp_path / "run"), device="cpu", stage=(stage,))).path
    told = " ".join(capsys.readouterr().err.split())
    assert f"{len(bad)} of {rows} pairs are skipped (bad_pairs)" in told and "longer than 512 tokens" in told
    records, evals = RunDirectory.open(run).metrics(), RunDirectory.open(run).evals()
    assert 250 < 32 * records[-1]["step"] / records[-1]["epoch"] < 320
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(math.isfinite(v) for r in evals for v in r.values())
    if model != "tiny":  # in the third epoch it tells the pairs apart that it has seen before
        assert sum(r["pairs/accuracy"] for r in records[-10:]) / 10 > 0.65
        assert sum(r["loss"] for r in records[-10:]) / 10 < 0.64
