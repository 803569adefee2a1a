"""What is printed when a run has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from truecourse.data.sequences import Message
from truecourse.run.directory import RunDirectory


def summary(result: Any, report: Path) -> None:
    """The run in a few lines: status, gold before and after, where things are."""
    s, console = result.summary, Console()
    table = Table(title=f"{s['method']} {result.path}: {s['status']} after {s['steps']} steps, {s['seconds']:.0f} s")
    for heading in ("measure", "first", "last", "best"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, g in s["gold"].items():
        table.add_row(
            f"gold {name}", _number(g["first"]), _number(g["last"]), f"{_number(g['best'])} at step {g['best_step']}"
        )
    if s["reward"]["last"] is not None:
        table.add_row("reward", _number(s["reward"]["first"]), _number(s["reward"]["last"]), "")
    if s.get("loss"):
        table.add_row("loss", _number(s["loss"]["first"]), _number(s["loss"]["last"]), "")
    console.print(table)
    if not s["gold"]:
        console.print("This run has no gold: nothing independent of its loss or reward says that it got better.")
    if s["status"] == "interrupted":
        console.print(f"Continue with: truecourse resume {result.path}", markup=False)
    console.print(f"Report: {report}", markup=False, soft_wrap=True)


def before_and_after(run: RunDirectory, name: str, count: int = 3) -> None:
    """Held-out accuracy and some real answers, before training and after it, from the run's own records."""
    console, evals = Console(), run.evals()
    first, last = evals[0], evals[-1]
    table = Table(title=f"held-out accuracy, {last['n']} prompts that training never saw")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("correct", f"{first[f'gold/{name}']:.1%}", f"{last[f'gold/{name}']:.1%}")
    spans = [f"{r[f'gold/{name}/low']:.1%} to {r[f'gold/{name}/high']:.1%}" for r in (first, last)]
    table.add_row("95 % interval", *spans)
    console.print(table)

    old, new = ({row["prompt_index"]: row for row in _rollouts(run, r["step"])} for r in (first, last))
    # what changed is what a reader wants to see; the first ones, in the order of the data
    changed = [i for i in old if old[i]["completion"] != new[i]["completion"]]
    samples = Table(title=f"the first {count} of them whose answers changed")
    for heading in ("prompt", "before", "after"):
        samples.add_column(heading)
    for i in (changed + [i for i in old if i not in changed])[:count]:
        samples.add_row(escape(_text(old[i]["prompt"])), *(_verdict(row[i], name) for row in (old, new)))
    console.print(samples)


def _rollouts(run: RunDirectory, step: int) -> list[dict[str, Any]]:
    lines = (run.path / "rollouts" / f"gold-{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _verdict(row: dict[str, Any], name: str) -> str:
    return f"{escape(row['completion'])}  ({'right' if row['parts'][name] == 1 else 'wrong'})"


def _text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
