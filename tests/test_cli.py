"""What a run leaves behind and what the command does, end to end on a random model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truecourse
from truecourse import cli
from truecourse import recipe as recipes
from truecourse.lab.tasks import task
from truecourse.recipe import Grpo, Lora, Recipe, RewardPart, Sampling, Sft
from truecourse.run.directory import RunDirectory

REWARD = """
import os
import signal

def digits(completion):
    return sum(c.isdigit() for c in completion) / max(1, len(completion))

def chaos(completion):  # another text, another score
    return sum(map(ord, completion)) % 97 / 97

def vowels(completion):
    return {"a": float("a" in completion), "e": float("e" in completion)}

calls = []

def stops(completion):
    calls.append(1)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return digits(completion)

def peaks(completions):
    calls.append(1)
    return [float({2: 1.0}.get(len(calls), 1 / (10 + len(calls))))] * len(completions)
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from truecourse.lab.tiny import save_new

    folder = tmp_path_factory.mktemp("models") / "random"
    save_new(folder, 0)
    (folder.parent / "reward.py").write_text(REWARD)
    write_data(folder.parent)
    return folder


def write_data(folder: Path) -> None:
    """A few rows of the lab's sums: all of them take a second to tokenise."""
    for name, rows in {
        "sums": task("sums")[:50], "held-out": task("sums-held-out")[:8], "demos": task("sums-demos")[:30],
    }.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def part(name: str, **more: Any) -> RewardPart:
    return RewardPart(use=f"reward.py:{name}", **more)


SFT = Sft(
    data="demos.jsonl", held_out="held-out.jsonl", steps=6, lr=5e-3, batch_size=4, gold=(part("chaos"),),
    gold_prompts=8, gold_every=4, gold_sampling=Sampling(max_tokens=8, temperature=0.0),
)  # fmt: skip
GRPO = Grpo(
    data="sums.jsonl", held_out="held-out.jsonl", steps=7, lr=5e-3, prompts_per_step=4, group_size=4,
    updates_per_rollout=2, sampling=Sampling(max_tokens=8), rewards=(part("digits"), part("vowels", weight=0.5)),
    gold=(part("chaos"), RewardPart(use="exact")), gold_prompts=8, gold_every=3, kl_every=2,
)  # fmt: skip


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(model: Path) -> RunDirectory:
    """SFT, then GRPO, from Python."""
    before = os.getcwd()
    os.chdir(model.parent)
    try:
        recipe = Recipe(model=str(model), out=str(model.parent / "finished"), seed=5, stage=(SFT, GRPO))
        result = truecourse.train(recipe, quiet=True)
    finally:
        os.chdir(before)
    assert result.summary["status"] == "finished"
    return RunDirectory.open(result.path)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dropped = ("time/", "memory/", "tokens/per_second")
    return [{k: v for k, v in record.items() if not k.startswith(dropped)} for record in records]


# -- the run directory ------------------------------------------------------------------------------------------------


def test_a_run_holds_what_the_design_says(finished: RunDirectory) -> None:
    assert sorted(os.listdir(finished.path)) == [
        "checkpoints", "environment.json", "evals.jsonl", "lock", "metrics.jsonl", "recipe.toml", "rollouts",
        "summary.json",
    ]  # fmt: skip
    names = [f"gold-{s:06d}.jsonl" for s in (0, 4, 6, 9, 12, 13)] + [f"step-{s:06d}.jsonl" for s in (7, 9, 11, 13)]
    assert sorted(os.listdir(finished.path / "rollouts")) == sorted(names)
    assert finished.environment()["versions"]["torch"] == torch.__version__
    assert not list(finished.path.rglob("*.tmp")) and not list(finished.path.rglob("*.bin"))


def test_the_summary_says_what_the_records_say(finished: RunDirectory) -> None:
    summary = json.loads((finished.path / "summary.json").read_text())
    metrics, evals = finished.metrics(), finished.evals()
    assert summary["method"] == "grpo" and summary["stages"] == ["sft", "grpo"] and summary["seed"] == 5
    assert summary["model"] == finished.recipe().model and summary["status"] == "finished" and summary["steps"] == 13
    assert summary["tokens"] == sum(r.get("tokens/prompt", 0) + r.get("tokens/completion", 0) for r in metrics)
    seconds = sum(r["time/step"] for r in metrics) + sum(r["time/gold"] for r in evals)
    assert summary["seconds"] == pytest.approx(seconds)
    values = [r["gold/chaos"] for r in evals]
    best = max(values)
    assert summary["gold"]["chaos"] == {
        "first": values[0], "last": values[-1], "best": best, "best_step": evals[values.index(best)]["step"],
    }  # fmt: skip
    assert set(summary["gold"]) == {"chaos", "exact"}
    rewards = [r["reward/mean"] for r in metrics if "reward/mean" in r]
    assert summary["reward"] == {"first": rewards[0], "last": rewards[-1]}
    assert summary["kl_ref"] == [r["kl/ref"] for r in metrics if "kl/ref" in r][-1]


ALWAYS = {"step", "stage", "method", "loss", "lr", "grad_norm", "entropy", "time/train", "time/step", "memory/peak"}
TOKENS = {"tokens/prompt", "tokens/completion", "tokens/per_second"}
ROLLOUT = {
    "reward/mean", "reward/std", "reward/digits", "reward/vowels", "reward/vowels/a", "reward/vowels/e",
    "reward/failed", "groups/zero_std_high", "groups/zero_std_low", "length/mean", "length/max", "length/truncated",
    "diversity", "time/rollout", "time/reward", "kl/sampler", "ess", *TOKENS,
}  # fmt: skip


def test_a_metric_is_there_where_it_means_something_and_nowhere_else(finished: RunDirectory) -> None:
    for record in finished.metrics():
        step = record["step"]
        if record["stage"] == 0:
            assert set(record) == ALWAYS | TOKENS | {"epoch"} and record["method"] == "sft" and step <= 6
            continue
        fresh = step in (7, 9, 11, 13)  # two updates for each rollout
        expected = ALWAYS | {"clip/fraction"} | (ROLLOUT if fresh else {"kl/update"})
        expected |= {"kl/ref", "kl/ref_k1"} if step % 2 == 0 else set()
        assert set(record) == expected and record["method"] == "grpo"
    for name in ("metrics.jsonl", "evals.jsonl"):
        for record in map(json.loads, (finished.path / name).open()):
            assert all(math.isfinite(v) for v in record.values() if not isinstance(v, str | bool)), record
            assert not {"NaN", "Infinity", "-Infinity"} & {v for v in record.values() if isinstance(v, str)}


def test_metrics_are_sums_over_the_rollout_files(finished: RunDirectory) -> None:
    by_step = {record["step"]: record for record in finished.metrics()}
    for step in (7, 9, 11, 13):
        rows, record = finished.read_rollouts(step, "step"), by_step[step]
        assert len(rows) == 16 and {row["kind"] for row in rows} == {"train"}
        assert [(row["prompt_index"], row["sample"]) for row in rows] == [
            (row["prompt_index"], i % 4) for i, row in enumerate(rows)
        ]
        for row in rows:
            own = sum(c.isdigit() for c in row["completion"]) / max(1, len(row["completion"]))
            letters = [float("a" in row["completion"]), float("e" in row["completion"])]
            assert row["parts"]["digits"] == own and row["parts"]["vowels"] == sum(letters)
            assert row["reward"] == pytest.approx(own + 0.5 * sum(letters))
        assert record["reward/mean"] == pytest.approx(statistics.mean(row["reward"] for row in rows))
        assert record["reward/std"] == pytest.approx(statistics.stdev(row["reward"] for row in rows))
        assert record["length/mean"] == statistics.mean(row["tokens"] for row in rows)
        assert record["length/truncated"] == statistics.mean(row["stop"] == "length" for row in rows)
        groups = [rows[i : i + 4] for i in range(0, 16, 4)]
        for group in groups:
            assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-5)
            assert {tuple(map(str, row["prompt"])) for row in group} == {tuple(map(str, group[0]["prompt"]))}


def test_the_gold_is_measured_at_the_start_every_n_steps_and_at_the_end(finished: RunDirectory) -> None:
    evals = finished.evals()
    assert [(r["stage"], r["step"]) for r in evals] == [(0, 0), (0, 4), (0, 6), (1, 6), (1, 9), (1, 12), (1, 13)]
    for record in evals:
        for name in ("chaos", "exact") if record["stage"] else ("chaos",):
            assert record[f"gold/{name}/low"] <= record[f"gold/{name}"] <= record[f"gold/{name}/high"]
            assert record[f"gold/{name}/low"] < record[f"gold/{name}/high"] or name == "chaos"
        assert record["n"] == 8 and "loss/held_out" not in record, "held-out rows are bare prompts"
        rows = [r for r in finished.read_rollouts(record["step"], "gold") if r["stage"] == record["stage"]]
        assert len(rows) == 8 and record["gold/chaos"] == pytest.approx(
            statistics.mean(row["parts"]["chaos"] for row in rows)
        )
    stages = [row["stage"] for row in finished.read_rollouts(6, "gold")]
    assert stages == [0] * 8 + [1] * 8, "the end of one stage and the start of the next are both kept"


# -- checkpoints ------------------------------------------------------------------------------------------------------


def answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Greedy answers by transformers' own generate."""
    out = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        got = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        out.append(tokenizer.decode(got, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return out


def test_checkpoints_are_plain_hugging_face_folders_with_the_weights_measured(finished: RunDirectory) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evals = [r for r in finished.evals() if r["stage"] == 1]
    best = max(evals, key=lambda r: (r["gold/chaos"], -r["step"]))["step"]
    assert best in (9, 12), "the stage's best is neither its start nor its end, so that it must have been kept"
    kept = {int(p.name.removeprefix("step-")) for p in (finished.path / "checkpoints").iterdir()}
    assert {best, 13} <= kept <= {4, 6, best, 13}
    for step in (best, 13):
        folder = finished.path / "checkpoints" / f"step-{step}"
        plain = AutoModelForCausalLM.from_pretrained(folder)
        rows = [row for row in finished.read_rollouts(step, "gold") if row["stage"] == 1]
        assert answers(plain, AutoTokenizer.from_pretrained(folder), rows) == [row["completion"] for row in rows]


def test_the_best_by_gold_is_kept_and_starts_the_next_stage(here: Path, model: Path) -> None:
    """A gold that peaks at its second measurement of the first stage."""
    first = dataclasses.replace(SFT, steps=6, gold_every=2, gold=(part("peaks"),))
    second = dataclasses.replace(GRPO, steps=1, gold=(), rewards=(part("digits"),), kl_every=1)
    recipe = Recipe(model=str(model), out="run", stage=(first, second))
    run = RunDirectory.open(truecourse.train(recipe, quiet=True).path)
    assert json.loads((run.path / "summary.json").read_text())["gold"]["peaks"]["best_step"] == 2
    assert sorted(os.listdir(run.path / "checkpoints")) == ["step-2", "step-7"]
    assert run.metrics()[-1]["kl/ref"] < 1e-6, "the second stage's reference is its start"
    from truecourse.trainer import model_folder

    assert model_folder("run").endswith("step-7")


def test_adapters_of_one_stage_go_on_over_those_of_the_last(here: Path, model: Path) -> None:
    import peft
    from transformers import AutoTokenizer

    stages = (dataclasses.replace(SFT, lr=5e-3), dataclasses.replace(GRPO, steps=3, lr=5e-3))
    recipe = Recipe(model=str(model), out="run", lora=Lora(rank=4), stage=stages)
    run = RunDirectory.open(truecourse.train(recipe, quiet=True).path)
    last = run.evals()[-1]["step"]
    folder = run.path / "checkpoints" / f"step-{last}"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    rows = [row for row in run.read_rollouts(last, "gold") if row["stage"] == 1]
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert answers(plain, AutoTokenizer.from_pretrained(folder), rows) == [row["completion"] for row in rows]
    texts = {row["completion"] for row in rows}
    assert texts != {row["completion"] for row in run.read_rollouts(0, "gold")}, "it has moved"

    # and a run's result is a model that another run can start from, adapters on top of adapters
    more = Recipe(model="run", out="more", lora=Lora(rank=2), stage=(dataclasses.replace(GRPO, steps=1),))
    again = RunDirectory.open(truecourse.train(more, quiet=True).path)
    best = max((r for r in run.evals() if r["stage"] == 1 and r["step"] > 6), key=lambda r: r["gold/chaos"])
    assert again.evals()[0]["gold/chaos"] == pytest.approx(best["gold/chaos"])
    assert (again.path / "base-0" / "model.safetensors").is_file()


# -- the same again ---------------------------------------------------------------------------------------------------


def records(run: Path) -> dict[str, Any]:
    opened = RunDirectory.open(run)
    files = {p.name: p.read_bytes() for p in sorted((run / "rollouts").iterdir())}
    files |= {str(p): p.read_bytes() for p in sorted(run.glob("checkpoints/*/*.safetensors"))}
    return {k.replace(str(run), ""): v for k, v in files.items()} | {
        "metrics": timeless(opened.metrics()),
        "evals": timeless(opened.evals()),
    }


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.1)])
def test_a_recipe_gives_the_same_bits_again_and_another_seed_others(here: Path, model: Path, lora: Lora | None) -> None:
    def go(out: str, seed: int) -> dict[str, Any]:
        torch.rand(3)  # what happened in the process before plays no part
        stages = (dataclasses.replace(SFT, steps=2), dataclasses.replace(GRPO, steps=2))
        recipe = Recipe(model=str(model), out=out, seed=seed, lora=lora, stage=stages)
        return records(truecourse.train(recipe, quiet=True).path)

    one, same, other = go("one", 1), go("same", 1), go("other", 2)
    assert one == same
    differ = {k for k in one if one[k] != other.get(k)}
    assert {"metrics", "step-000003.jsonl"} <= differ and any("safetensors" in k for k in differ)


# -- verbs ------------------------------------------------------------------------------------------------------------

Run = Callable[..., str]


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: str, code: int = 0) -> str:
        """What the command prints on stdout."""
        capsys.readouterr()
        got = cli.main(list(args))
        out, err = capsys.readouterr()
        assert got == code, err
        return out + ("\n" + err if code else "")

    return run


def test_from_init_to_a_report(run: Run, here: Path, model: Path) -> None:
    assert "truecourse train mine.toml" in run("init", "mine.toml", "--method", "grpo")
    sets = [f"model={model}", "steps=3", "prompts_per_step=2", "group_size=2", "gold_prompts=4", "out=here", "seed=9"]
    out = run("train", "mine.toml", *(word for text in sets for word in ("--set", text)))
    assert "grpo here: finished after 3 steps" in out and "gold correct" in out and "here/report.html" in out
    assert RunDirectory.open("here").recipe().seed == 9
    assert (here / "here" / "report.html").stat().st_size > 10_000
    page = (here / "here" / "report.html").stat().st_mtime_ns
    out = run("resume", "here")
    assert "finished after 3 steps" in out and (here / "here" / "report.html").stat().st_mtime_ns == page
    run("train", "mine.toml", *(word for text in [*sets, "out=there", "seed=3"] for word in ("--set", text)))
    assert "report.html" in run("report", "here", "there")
    assert (here / "report.html").is_file()
    assert run("report", "here", "--out", "one.html").strip() == "one.html"


def test_eval_of_a_run_is_its_own_gold_again(run: Run, finished: RunDirectory) -> None:
    evals = [r for r in finished.evals() if r["stage"] == 1 and r["step"] > 6]
    best = max(evals, key=lambda r: (r["gold/chaos"], -r["step"]))
    record = json.loads(run("eval", str(finished.path), "--json"))
    assert record == {k: v for k, v in best.items() if k not in ("step", "stage", "time/gold")}
    table = run("eval", str(finished.path))
    assert "8 prompts" in table and "chaos" in table and "95 % interval" in table


def test_eval_of_any_model_and_its_kept_answers(run: Run, here: Path, model: Path) -> None:
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    (here / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["eval", str(model), "--data", "test.jsonl", "--use", "number", "--columns", "prompt=question"]
    args += ["--max-tokens", "6", "--json"]
    whole = json.loads(run(*args, "--out", "kept.jsonl"))
    assert whole["n"] == 20 and json.loads(run(*args)) == whole
    lines = (here / "kept.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 21
    (here / "kept.jsonl").write_text("".join(lines[:8]) + lines[8][:30])  # killed inside a line
    assert json.loads(run(*args, "--out", "kept.jsonl")) == whole
    assert sorted((here / "kept.jsonl").read_text().splitlines()) == sorted(line.strip() for line in lines)
    assert "holds an evaluation with other settings" in run(*args, "--seed", "5", "--out", "kept.jsonl", code=2)
    (here / "test.jsonl").write_text("".join(json.dumps(row | {"question": "7+1="}) + "\n" for row in rows))
    assert "holds an evaluation with other settings" in run(*args, "--out", "kept.jsonl", code=2)
    assert json.loads(run(*args, "--prompts", "5"))["n"] == 5


def test_sample_answers_with_a_run_or_a_model(run: Run, finished: RunDirectory, model: Path) -> None:
    args = ["sample", str(finished.path), "12+34=", "--max-tokens", "6", "--n", "3"]
    out = run(*args)
    assert out.count("--- ") == 3 and run(*args) == out and run(*args, "--seed", "1") != out
    greedy = run("sample", str(model), "12+34=", "--max-tokens", "6", "--temperature", "0")
    assert greedy == run("sample", str(model), "12+34=", "--max-tokens", "6", "--temperature", "0", "--seed", "8")
    assert greedy != run("sample", str(model), "12+34=", "--max-tokens", "6", "--temperature", "0", "--plain")


def test_ctrl_c_in_the_middle_exits_with_130_and_resume_ends_it(run: Run, here: Path, model: Path) -> None:
    import tomli_w

    stage = dataclasses.replace(GRPO, steps=6, rewards=(part("stops"),), gold_every=5)
    table = recipes.to_table(Recipe(model=str(model), out="run", stage=(stage,)))
    (here / "r.toml").write_text(tomli_w.dumps(table))
    before = signal.getsignal(signal.SIGINT)
    out = run("train", "r.toml", "--quiet", code=130)
    assert "interrupted after 3 steps" in out and "Continue with: truecourse resume run" in out
    assert "stopping after the step in flight; press Ctrl-C again" in out
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (here / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert "finished after 6 steps" in run("resume", "run", "--quiet")


def test_a_gold_reached_stops_the_run(run: Run, here: Path, model: Path) -> None:
    stage = dataclasses.replace(SFT, steps=8, gold_every=2, gold=(part("peaks"),), stop_at=0.9)
    result = truecourse.train(Recipe(model=str(model), out="run", stage=(stage,)), quiet=True)
    assert result.summary["status"] == "stopped" and result.summary["steps"] == 2
    assert [p.name for p in (here / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert "stopped after 2 steps" in run("resume", "run")


def test_held_out_prompts_that_are_trained_on_are_said(here: Path, model: Path, capfd: Any) -> None:
    stage = dataclasses.replace(GRPO, steps=1, held_out="sums.jsonl")
    truecourse.train(Recipe(model=str(model), out="run", stage=(stage,)), quiet=True)
    assert "held-out prompts are trained on as well" in capfd.readouterr().err


# -- start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import truecourse", "from truecourse.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported_before_a_run(code: str) -> None:
    check = f"import sys; {code}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert statistics.median(spent) < 0.5
