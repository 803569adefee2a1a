"""`truecourse quickstart`: GRPO on the shipped tiny model, from its SFT start to a clearly better one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from truecourse import recipe as recipes
from truecourse import report, show, trainer
from truecourse.errors import UserError
from truecourse.recipe import Recipe
from truecourse.run.directory import RunDirectory

RECIPE = Path(__file__).parent / "lab" / "quickstart.toml"


def recipe(seed: int, out: str | Path) -> Recipe:
    """The quickstart's recipe, ready for `truecourse.train`."""
    return dataclasses.replace(recipes.load(RECIPE), seed=seed, out=str(out)).check()


def run(seed: int, out: Path, quiet: bool = False) -> trainer.Result:
    """Train, or continue what was interrupted; then show what changed. A finished run is shown again, not repeated."""
    console = Console()
    asked = recipe(seed, out)
    if (out / "recipe.toml").is_file():
        run = RunDirectory.open(out)
        if run.recipe() != trainer.resolve(asked):
            raise UserError(f"{str(out)!r} holds a run of another recipe or seed; choose another directory with --out")
        console.print(f"{out} is there already: continuing it", markup=False, soft_wrap=True)
        result = trainer.resume(out, quiet=quiet)
    else:
        console.print(
            "GRPO on two-digit sums: 38+47= should give 85. "
            "The start has seen a few demonstrations; from here on it sees its own answers and whether they are right.",
            markup=False,
        )
        result = trainer.train(asked, quiet=quiet)
    if result.summary["status"] == "interrupted":
        console.print(
            f"Interrupted; continue with: truecourse quickstart --seed {seed} --out {out}", markup=False, soft_wrap=True
        )
        return result
    show.before_and_after(RunDirectory.open(out), asked.stage[0].gold[0].label)
    console.print(f"Report: {report.build([out])}", markup=False, soft_wrap=True)
    return result
