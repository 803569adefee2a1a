"""The docs say what is there: their code runs, their links exist, every metric that a run writes is in the table."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import truecourse
from truecourse import Dpo, Grpo, Recipe, RewardPart, Sampling, Sft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"\b(?:tests|benchmarks|docs)/[\w/-]+\.(?:py|md|svg)\b", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in re.findall(r"`((?:methods|objective|model|rollout|run|report|rewards|data|lab)/[\w/-]+\.py)`", text):
        assert (ROOT / "src" / "truecourse" / name).exists(), f"{page.name} names {name}"


def test_the_readmes_python_runs_as_it_is(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    full = truecourse.train
    short = lambda recipe: full(  # noqa: E731
        dataclasses.replace(recipe, stage=tuple(dataclasses.replace(s, steps=2) for s in recipe.stage)), quiet=True
    )
    monkeypatch.setattr(truecourse, "train", short, raising=False)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "'correct': {'first':" in capsys.readouterr().out
    assert (tmp_path / "runs/sums/summary.json").is_file()
    names: dict = {}
    exec(compile(blocks[1], "README.md", "exec"), names)
    assert names["reward"]("47+38=", " 85", "85") == 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "run"
    exact = (RewardPart(use="exact"),)
    common = {"held_out": "lab:sums-held-out", "gold": exact, "gold_every": 2, "gold_prompts": 16}
    stages = (
        Sft(data="lab:sums-demos", steps=2, batch_size=8, gold_sampling=Sampling(max_tokens=8), **common),
        Grpo(
            data="lab:sums", steps=4, rewards=(*exact, RewardPart(use="regex", args={"pattern": r"\d+"})), beta=0.01,
            sampling=Sampling(max_tokens=8), prompts_per_step=4, updates_per_rollout=2, variant="dapo", **common,
        ),
        Dpo(data="lab:sums-pairs-held-out", steps=2, batch_size=4, **common | {"held_out": 20}),
    )  # fmt: skip
    return truecourse.train(Recipe(out=str(out), stage=stages), quiet=True).path


def _documented(section: str) -> list[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split(f"## {section}")[1].split("\n## ")[0]
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("| `"):
            first = line.split("|")[1]
            found = re.findall(r"`([^`]+)`", first)
            names += [found[0]] + [found[0].rpartition("/")[0] + f if f.startswith("/") else f for f in found[1:]]
    assert len(names) > 3
    return names


def _matches(key: str, documented: list[str]) -> bool:
    return any(re.fullmatch(re.sub(r"<\w+>", "[^/]+", re.escape(name)), key) for name in documented)


@pytest.mark.parametrize("file", ["metrics.jsonl", "evals.jsonl"])
def test_every_metric_is_documented_and_real(run, file):
    documented = [re.sub(r"\\", "", n) for n in _documented(file)]
    records = [json.loads(line) for line in (run / file).read_text().splitlines()]
    for key in {key for record in records for key in record}:
        assert _matches(key, [*documented, "step", "stage"]), f"{file} has {key}, which docs/metrics.md does not"
    for record in records:
        assert None not in record.values() and "NaN" not in record.values()


def test_the_summary_is_documented(run):
    summary = json.loads((run / "summary.json").read_text())
    for key in summary:
        assert key in _documented("summary.json"), key
    for key in ("method", "model", "seed", "steps", "seconds", "tokens", "gold", "reward", "kl_ref", "status"):
        assert key in summary
    assert set(summary["gold"]["exact"]) == {"first", "last", "best", "best_step"}
    assert set(summary["reward"]) == {"first", "last"}


def test_an_undocumented_metric_would_be_noticed():
    assert not _matches("reward/", _documented("metrics.jsonl"))
    assert not _matches("made/up", _documented("metrics.jsonl"))
    assert _matches("reward/exact", _documented("metrics.jsonl"))
