"""A run directory as plain tables. Nothing here knows of the page; nothing writes.

A run may be killed at any instant, so the last line of a .jsonl file may be cut: that line, and only that one, is
left out and said so in `notes`. Anything else that does not parse is a `UserError` with its file and line.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truecourse.errors import UserError

Record = dict[str, Any]

MARKS = ("recipe.toml", "metrics.jsonl", "summary.json", "evals.jsonl")
"""A directory that holds none of these is not a run."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How a record, which is strict JSON, writes what JSON has no number for."""

ROLLOUT = re.compile(r"step-(\d+)\.jsonl|gold-(\d+)\.jsonl")


@dataclass
class Run:
    """What a run directory holds, parsed."""

    path: Path
    metrics: list[Record] = field(default_factory=list)
    """One record per optimiser step, steps ascending and each once."""
    evals: list[Record] = field(default_factory=list)
    """One record per gold measurement, ordered by (stage, step)."""
    findings: list[Record] | None = None
    """None where no doctor has written any."""
    rollouts: list[tuple[str, int, Path]] = field(default_factory=list)
    """(`train` or `gold`, step, file), not yet read; ordered by step."""
    summary: Record = field(default_factory=dict)
    environment: Record = field(default_factory=dict)
    recipe: Record = field(default_factory=dict)
    recipe_text: str = ""
    notes: list[str] = field(default_factory=list)
    """What the reader should know about the records themselves, in sentences."""


def run_directory(path: str | Path) -> Run:
    """Everything in a run directory but its rollouts, whose files are only listed.

    Raises `UserError` where `path` is not a run directory or a file in it is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"run {str(path)!r} does not exist")
    if not path.is_dir():
        raise UserError(f"{str(path)!r} is a file, not a run directory; name the folder that holds metrics.jsonl")
    if not any((path / name).is_file() for name in MARKS):
        raise UserError(f"{str(path)!r} is not a run directory: it has none of {', '.join(MARKS)}")
    run = Run(path)
    run.metrics = _by_step(run, "metrics.jsonl", key=lambda r: (r["step"],))
    run.evals = _by_step(run, "evals.jsonl", key=lambda r: (r.get("stage", 0), r["step"]))
    if (path / "findings.jsonl").is_file():
        run.findings = jsonl(path / "findings.jsonl", run.notes)
    for file in (path / "rollouts").glob("*.jsonl"):
        if match := ROLLOUT.fullmatch(file.name):
            run.rollouts.append(("train" if match[1] else "gold", int(match[1] or match[2]), file))
    run.rollouts.sort(key=lambda r: (r[1], r[0]))
    run.summary = _json(path / "summary.json")
    run.environment = _json(path / "environment.json")
    if (path / "recipe.toml").is_file():
        run.recipe_text, run.recipe = _toml(path / "recipe.toml")
    return run


def jsonl(path: Path, notes: list[str]) -> list[Record]:
    """The records of a .jsonl file; [] where it is absent. A cut last line is left out and added to `notes`."""
    if not path.is_file():
        return []
    lines = _bytes(path).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            if number == len(lines):  # no line break behind it: the writer was killed in the middle
                notes.append(
                    f"The last line of {path.name} is cut: the run was killed while writing it. It is left out."
                )
                break
            raise UserError(f"{path}, line {number}: not a record ({error}); mend or remove the line") from None
        records.append(record)
    return records


def _by_step(run: Run, name: str, key: Any) -> list[Record]:
    """The records of a file in order of their key; of records that repeat one, the last written stands."""
    records = jsonl(run.path / name, run.notes)
    kept: dict[tuple[int, ...], Record] = {}
    for i, line in enumerate(records):
        record = {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}
        if not isinstance(record.get("step"), int):
            raise UserError(f"{run.path / name}, record {i + 1}: `step` is missing or not an integer")
        kept[key(record)] = record
    if repeated := len(records) - len(kept):
        run.notes.append(f"{repeated} records of {name} repeat a step; the last written of each is shown.")
    return [kept[k] for k in sorted(kept)]


def _json(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, found {type(value).__name__}")
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return value


def _toml(path: Path) -> tuple[str, Record]:
    try:
        text = _bytes(path).decode("utf-8")
        return text, tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
