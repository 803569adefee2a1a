"""The command line: one subcommand per verb. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from truecourse.errors import RunError, UserError

Set = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def train(recipe: Positional[Path], /, set_: Set = (), quiet: bool = False) -> int:
    """Train by a recipe, from its start. Ctrl-C stops after the step in flight with a checkpoint.

    Args:
        recipe: The recipe's TOML file; `truecourse init` writes one.
        set_: Change a recipe key, for example --set lr=1e-5 or --set stage.0.sampling.max_tokens=64.
        quiet: No progress display.
    """
    from truecourse import recipe as recipes

    loaded = recipes.load(recipe, set_)  # what is wrong with it shows before the seconds that torch takes to import
    from truecourse import trainer

    return _finish(trainer.train(loaded, quiet=quiet))


def resume(run: Positional[Path], /, quiet: bool = False) -> int:
    """Continue an interrupted run from its last checkpoint; the result is that of a run never stopped.

    Args:
        run: The run directory.
        quiet: No progress display.
    """
    from truecourse import trainer

    return _finish(trainer.resume(run, quiet=quiet))


def init(path: Positional[Path] = Path("recipe.toml"), /, method: str = "grpo", every_key: bool = False) -> None:
    """Write a commented recipe to start from.

    Args:
        path: Where to write it; an existing file is never overwritten.
        method: The method of its stage: grpo, dpo or sft.
        every_key: List every setting with its default, in place of the ones that most runs set.
    """
    from truecourse import starter

    starter.write(path, method, every_key)
    print(f"wrote {path}; run it with: truecourse train {path}")


def evaluate(
    source: Positional[str], /, data: str = "", use: str = "", prompts: int = 0, max_tokens: int = 0,
    temperature: float = -1.0, columns: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NEW=OLD")] = (),
    chat: bool = False, system: str = "", out: str = "", json: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    """Measure a run's best checkpoint, or any model, on held-out prompts.

    Args:
        source: A run directory, a Hugging Face folder, a hub id, a .gguf file, or `tiny`.
        data: Rows to measure on; for a run, its own held-out rows by default.
        use: Verifier: exact, number, regex, math, or your own file.py:function; for a run, its own gold by default.
        prompts: Most prompts to use; 0 is all (for a run: as many as its gold uses).
        max_tokens: Most tokens of an answer; 0 is 256 (for a run: its own).
        temperature: Sampling temperature, 0 is greedy; by default 0 (for a run: its own).
        columns: Columns to rename, for example --columns prompt=question.
        chat: Wrap plain-text prompts as a user's chat message.
        system: System message put before chat prompts.
        out: Keep each answer in this .jsonl file as it is scored, and skip those already there: a killed evaluation
            goes on.
        json: Print the result as JSON.
        seed: Seed of the sampling streams.
    """
    from truecourse import evaluate as evaluation

    pairs = dict(_pair(text) for text in columns)
    evaluation.run(
        source, data=data, use=use, prompts=prompts, max_tokens=max_tokens, temperature=temperature,
        columns=pairs, chat=chat, system=system, out=out, as_json=json, seed=seed,
    )  # fmt: skip


def sample(
    source: Positional[str], prompt: Positional[str], /, n: int = 1, max_tokens: int = 256, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, stop: UseAppendAction[tuple[str, ...]] = (), plain: bool = False,
    system: str = "", seed: int = 0,
) -> None:  # fmt: skip
    """Answer a prompt with a run's best checkpoint, or with any model.

    Args:
        source: A run directory, a Hugging Face folder, a hub id, a .gguf file, or `tiny`.
        prompt: The prompt; `-` reads it from standard input.
        n: How many answers.
        max_tokens: Most tokens of an answer.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus: the smallest set of tokens with this much probability.
        top_k: Only the k likeliest tokens; 0 is off.
        stop: A string that ends an answer; may be given several times.
        plain: Do not put the prompt through the model's chat template.
        system: System message.
        seed: Seed of the sampling streams.
    """
    from truecourse import evaluate as evaluation

    text = sys.stdin.read() if prompt == "-" else prompt
    evaluation.sample(
        source, text, n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=tuple(stop),
        plain=plain, system=system, seed=seed,
    )  # fmt: skip


def report(runs: Positional[tuple[Path, ...]], /, out: Path | None = None) -> None:
    """Write one self-contained HTML page for a run, or for several laid over each other.

    Args:
        runs: Run directories.
        out: Where to write it; by default RUN/report.html, or report.html here for several runs.
    """
    from truecourse import report as reports

    if not runs:
        raise UserError("name at least one run: truecourse report RUN [RUN ...]")
    print(reports.build(list(runs), out))


def quickstart(seed: int = 0, out: Path = Path("runs/quickstart"), quiet: bool = False) -> int:
    """Take the shipped tiny model through GRPO on two-digit sums, and show what it learned (about a minute).

    Args:
        seed: Every random stream is derived from it.
        out: The run directory.
        quiet: No progress display.
    """
    from truecourse import quickstart as story

    return INTERRUPTED if story.run(seed, out, quiet).summary["status"] == "interrupted" else 0


INTERRUPTED = 130
"""Exit code of a run that a signal stopped, as shells have it for Ctrl-C."""

VERBS: dict[str, Any] = {
    "quickstart": quickstart,
    "init": init,
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "sample": sample,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 the run or the machine failed, 2 the user's mistake, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"truecourse {version('truecourse')}")
        return 0
    with_traceback = "--traceback" in args
    args = [a for a in args if a != "--traceback"]
    try:
        done = tyro.extras.subcommand_cli_from_dict(VERBS, prog="truecourse", description=_DESCRIPTION, args=args)
        return done or 0
    except SystemExit as error:  # how tyro ends: after --help with 0, after a usage error with 2
        return error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`: nobody reads on, and the interpreter's own flush at exit must not say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if with_traceback:
            print(getattr(error, "traceback", ""), file=sys.stderr)  # a reward's own, which was kept from its sample
            raise
        if isinstance(error, UserError | RunError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            hint = "See where with: truecourse ... --traceback"
            print(f"unexpected {type(error).__name__}: {error}\n{hint}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


_DESCRIPTION = """Align language models, and show with measurements whether the run can be trusted.

Start with `truecourse quickstart`. Add --traceback to any verb to see where an error came from."""


def _pair(text: str) -> tuple[str, str]:
    new, equals, old = text.partition("=")
    if not equals or not new or not old:
        raise UserError(f"--columns {text!r} is not NEW=OLD, for example --columns prompt=question")
    return new, old


def _finish(result: Any) -> int:
    from truecourse import report as reports
    from truecourse.show import summary

    page = result.path / "report.html"
    if result.trained or not page.is_file():
        page = reports.build([result.path])
    summary(result, page)
    return INTERRUPTED if result.summary["status"] == "interrupted" else 0
