"""The run directory: all that the rest of the package needs to know of a run.

    recipe.toml        the resolved recipe                     environment.json   where it ran, with which versions
    metrics.jsonl      one record per optimiser step           evals.jsonl        one record per gold measurement
    findings.jsonl     what the guard and the doctor found     summary.json       the run in a dozen numbers
    rollouts/          step-000012.jsonl, gold-000025.jsonl    checkpoints/       step-25/, see run/checkpoint.py
    lock               held by the process that trains here

A record is one line of JSON, its keys in the order given, its floats exact. JSON has no NaN and no infinity, and a
metric that went NaN must not be lost: they are written as the strings "NaN", "Infinity" and "-Infinity", and read back
as floats. Steps count optimiser steps over the whole run, all stages together, and 0 is before the first.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from truecourse import recipe as recipes
from truecourse.errors import RunError, UserError
from truecourse.recipe import Recipe
from truecourse.run import checkpoint
from truecourse.run.files import append_line, disk_message, reason, write_atomically

RECORDS = ("metrics.jsonl", "evals.jsonl", "findings.jsonl")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunDirectory:
    """A run's folder. `create` makes one, `open` takes one that exists; hold `lock()` while training in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def check_free(cls, path: str | Path) -> None:
        """Raise `UserError` where no run can be made at `path`: not empty, not a folder, not writable."""
        path, other = Path(path), "choose another directory, for example --set out=runs/new"
        if (path / "recipe.toml").exists():
            raise UserError(
                f"{str(path)!r} already holds a run: continue it with `truecourse resume {path}`, or {other}"
            )
        try:
            # A kill before recipe.toml was in place leaves at most its aside file, which counts as nothing.
            content = [name for name in sorted(os.listdir(path)) if not name.endswith(".tmp")]
        except FileNotFoundError:
            content = []
        except OSError as error:
            raise UserError(f"run directory {str(path)!r} cannot be used: {error.strerror}; {other}") from None
        if content:
            raise UserError(f"{str(path)!r} is not empty (it holds {content[0]!r}) and a run needs its own; {other}")
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"run directory {str(path)!r} cannot be made: {str(there)!r} is not writable; {other}")

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, environment: Mapping[str, Any]) -> RunDirectory:
        """Make the folder, and write the recipe and the environment into it.

        Raises `UserError` where the folder exists and is not empty, or cannot be made or written.
        """
        run = cls(path)
        try:
            text = tomli_w.dumps(recipes.to_table(recipe))
        except TypeError as error:
            raise UserError(f"the recipe holds a value that recipe.toml cannot: {error}") from None
        cls.check_free(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_atomically(run.path / "recipe.toml", text.encode())
            run.write_environment(environment)
        except (OSError, RunError) as error:
            raise UserError(
                f"run directory {str(path)!r} cannot be written: {reason(error.__cause__ or error)}; "
                "choose another, for example --set out=runs/new"
            ) from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The run in an existing folder. Raises `UserError` where there is none, naming what was looked for."""
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"run {str(path)!r} does not exist; a run is a folder with a recipe.toml in it")
        if not (run.path / "recipe.toml").is_file():
            raise UserError(f"{str(path)!r} is not a run: there is no {str(run.path / 'recipe.toml')!r}")
        return run

    def recipe(self) -> Recipe:
        """The resolved recipe, read back and checked."""
        return recipes.load(self.path / "recipe.toml")

    def ended(self) -> dict[str, Any] | None:
        """summary.json of a run that has come to its end (finished, or stopped by its gold); None for any other."""
        path = self.path / "summary.json"
        summary = json.loads(path.read_bytes()) if path.is_file() else {}
        return summary if summary.get("status") in ("finished", "stopped") else None

    # -- one process at a time ---------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the kernel lets go when it ends, however it ends.

        What a killed holder left of a checkpoint is cleared first. Raises `UserError` naming the process that holds it.
        """
        path = self.path / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunError(disk_message("write", path, error)) from error
        held = [fd]
        # A forked worker that outlives a killed trainer shares the lock: it must let go of it.
        os.register_at_fork(after_in_child=lambda: os.close(held.pop()) if held else None)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise UserError(
                    f"run {str(self.path)!r} is being trained by process {holder}; "
                    f"wait for it, stop it (`kill -INT {holder}` writes a checkpoint first), or use another directory"
                ) from None
            except OSError as error:
                raise RunError(f"cannot lock {path}: {error.strerror}; this file system has no file locks") from error
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            checkpoint.tidy(self.path)
            yield
            if held:
                os.ftruncate(fd, 0)
        finally:
            if held:
                os.close(held.pop())

    # -- writing -----------------------------------------------------------------------------------------------------

    def metric(self, record: Mapping[str, Any]) -> None:
        """Append one optimiser step's record, flushed to the disk."""
        append_line(self.path / "metrics.jsonl", dumps(record))

    def eval(self, record: Mapping[str, Any]) -> None:
        """Append one gold measurement, flushed to the disk."""
        append_line(self.path / "evals.jsonl", dumps(record))

    def finding(self, record: Mapping[str, Any]) -> None:
        """Append one finding, flushed to the disk."""
        append_line(self.path / "findings.jsonl", dumps(record))

    def rollouts(self, step: int, kind: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write the completions of a step, one a line, as rollouts/KIND-STEP.jsonl, whole or not at all.

        `kind` is "step" for those trained on, "gold" for those of a gold measurement. A score that is not finite stays
        the string "NaN" when read back here: rows hold text, where "NaN" may be what the model wrote.
        """
        folder = self.path / "rollouts"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(disk_message("make", folder, error)) from error
        path = folder / f"{kind}-{step:06d}.jsonl"
        write_atomically(path, b"".join(dumps(row) for row in rows))
        return path

    def read_rollouts(self, step: int, kind: str) -> list[dict[str, Any]]:
        """What `rollouts` wrote for this step; [] where it wrote nothing."""
        path = self.path / "rollouts" / f"{kind}-{step:06d}.jsonl"
        return [json.loads(line) for line in _split(path)]

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_atomically(self.path / "summary.json", _pretty(summary))

    def summarise(self, status: str, **more: Any) -> dict[str, Any]:
        """Write summary.json from the records and the recipe (see `summarise`); `more` is added to it. Returns it."""
        summary = summarise(self.recipe(), self.metrics(), self.evals(), status) | more
        self.summary(summary)
        return summary

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json: once when the run is created, again where it is resumed elsewhere."""
        write_atomically(self.path / "environment.json", _pretty(environment))

    # -- reading -----------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the optimiser steps; a last line that a kill cut short is not one."""
        return [_thaw(json.loads(line)) for line in self._lines("metrics.jsonl")]

    def evals(self) -> list[dict[str, Any]]:
        """The gold measurements; a last line that a kill cut short is not one."""
        return [_thaw(json.loads(line)) for line in self._lines("evals.jsonl")]

    def findings(self) -> list[dict[str, Any]]:
        """The findings; a last line that a kill cut short is not one."""
        return [json.loads(line) for line in self._lines("findings.jsonl")]

    def environment(self) -> dict[str, Any]:
        """environment.json, or {} for a run killed before it was written."""
        path = self.path / "environment.json"
        return json.loads(path.read_bytes()) if path.is_file() else {}

    def _lines(self, name: str) -> list[bytes]:
        """The whole lines of a record file, each checked to be JSON."""
        path = self.path / name
        lines = _split(path)
        for number, line in enumerate(lines, start=1):
            if _record(line) is None:
                raise RunError(
                    f"{path}, line {number} is damaged: {line[:80]!r}; remove that line, or restore the file"
                )
        return lines

    # -- going back --------------------------------------------------------------------------------------------------

    def rewind(self, step: int, stage: int | None = None) -> None:
        """Drop what came after `step`: records, rollouts, checkpoints, and last lines that a kill cut short.

        What is kept stays byte for byte; running on from a checkpoint of `step` then gives the very files of a run that
        was never stopped. A record without a step counts as step 0; `rewind(-1)` empties the run. Where the last step
        of one stage is also the start of the next, `stage` drops records of later stages too (their key "stage", an
        index). A kill in the middle does no harm: the checkpoints go first, and the next rewind ends the work.
        """
        checkpoint.drop_after(self.path, step)
        for path in self.path.glob(".*.tmp"):  # what a killed write left aside
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in RECORDS:
            path = self.path / name
            if not path.is_file():
                continue
            kept: list[bytes] = []
            damaged = 0
            for number, line in enumerate(_split(path), start=1):
                record = _record(line)
                if record is None:
                    damaged = damaged or number
                    continue
                if (record.get("step") or 0) > step or (stage is not None and (record.get("stage") or 0) > stage):
                    continue
                if damaged:
                    raise RunError(f"{path}, line {damaged} is damaged; remove that line, or restore the file")
                kept.append(line)
            content = b"".join(line + b"\n" for line in kept)
            if content != path.read_bytes():
                write_atomically(path, content)
            if not content:
                path.unlink()
        for path in (self.path / "rollouts").glob("*"):
            at = path.stem.rpartition("-")[2]
            if path.name.endswith(".tmp") or (at.isdigit() and int(at) > step):
                path.unlink()


def dumps(record: Mapping[str, Any]) -> bytes:
    """A record as one line of strict JSON in UTF-8, newline included."""
    plain = _plain(record)
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, out of a user's file: only an escape can carry it
        return json.dumps(plain, allow_nan=False).encode() + b"\n"


def summarise(
    recipe: Recipe, metrics: list[dict[str, Any]], evals: list[dict[str, Any]], status: str
) -> dict[str, Any]:
    """The run in a dozen numbers: what summary.json holds.

    `steps` is the last step done. `seconds` and `tokens` are totals over all records (by the functions so called), so
    they survive a resume. `gold` has, for each `gold/<name>`, the first, last and best (highest, earliest among
    equals) value and the best's step. `reward` has the first and last `reward/mean`, `kl_ref` the last `kl/ref` (nats
    per sequence); null where the method has none. `status` is running, finished, interrupted, stopped or failed.
    """
    gold: dict[str, dict[str, Any]] = {}
    for record in evals:
        for key, value in record.items():
            name = key.removeprefix("gold/")
            if name == key or "/" in name:  # gold/<name>/low and /high are its interval
                continue
            entry = gold.setdefault(name, {"first": value, "last": value, "best": None, "best_step": None})
            entry["last"] = value
            if not math.isnan(value) and (entry["best"] is None or value > entry["best"]):
                entry["best"], entry["best_step"] = value, record["step"]

    def series(key: str) -> list[Any]:
        return [record[key] for record in metrics if record.get(key) is not None] or [None]

    records = metrics + evals
    summary = {
        "method": recipe.stage[-1].method,
        "stages": [stage.method for stage in recipe.stage],
        "model": recipe.model,
        "seed": recipe.seed,
        "steps": max((record["step"] for record in metrics), default=0),
        "seconds": math.fsum(seconds(record) for record in records),
        "tokens": sum(tokens(record) for record in records),
        "gold": gold,
        "reward": {"first": series("reward/mean")[0], "last": series("reward/mean")[-1]},
        "kl_ref": series("kl/ref")[-1],
        "status": status,
    }
    if series("loss") != [None]:
        summary["loss"] = {"first": series("loss")[0], "last": series("loss")[-1]}
    return summary


def seconds(record: Mapping[str, Any]) -> float:
    """Wall seconds that a record accounts for: its `time/step`, or the sum of its `time/<phase>`."""
    if "time/step" in record:
        return record["time/step"]
    return math.fsum(value for key, value in record.items() if key.startswith("time/"))


def tokens(record: Mapping[str, Any]) -> int:
    """Tokens that a record accounts for: its prompts' and its completions', sampled or (SFT) given and trained on."""
    return record.get("tokens/prompt", 0) + record.get("tokens/completion", record.get("tokens/trained", 0))


def _pretty(table: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(table), indent=2, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy and torch scalars as numbers, floats that are not finite as strings."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        )
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record cannot hold {value!r} ({type(value).__name__})")


def _thaw(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_thaw(v) for v in value]
    if isinstance(value, dict):
        return {key: _thaw(v) for key, v in value.items()}
    return value


def _split(path: Path) -> list[bytes]:
    """The lines that end in a newline; what follows the last one was cut short."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
