"""Sending the records to a tracker as well. The run directory stays the truth: a failing tracker never stops a run."""

from __future__ import annotations

import importlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from truecourse import recipe as recipes
from truecourse.errors import UserError
from truecourse.recipe import Recipe
from truecourse.run.files import write_atomically


class Tracker:
    """Takes every record: `log(step, record)` sends its numbers, `close()` ends the tracker's run."""

    def __init__(self, name: str, send: Callable[[dict[str, float], int], None], finish: Callable[[], None]) -> None:
        self.name, self._send, self._finish, self._failed = name, send, finish, False

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record under its own keys; text and `step` itself stay in the run directory."""
        numbers = {
            key: value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._try(lambda: self._send(numbers, step))

    def close(self) -> None:
        """Flush what is on its way."""
        self._try(self._finish)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # the tracker's own failure, whatever it is: said once, and the run goes on
            self._failed = True
            print(
                f"warning: {self.name} failed ({type(error).__name__}: {error}); nothing more is sent to it, "
                "the run directory has every record",
                file=sys.stderr,
                flush=True,
            )


def check(name: str) -> None:
    """Raise `UserError`, naming the extra to install, where the tracker's package is missing."""
    if name != "none":
        _import(name)


def tracker(name: str, run_dir: str | Path, recipe: Recipe, step: int = 0) -> Tracker:
    """The tracker that `Recipe.tracker` names. `step` is where a resumed run goes on: the same tracker run continues.

    TensorBoard writes to RUN/tensorboard; W&B and trackio use the project in WANDB_PROJECT or TRACKIO_PROJECT, or
    "truecourse", and a run id kept in RUN/tracker.json. Raises `UserError` naming the extra to install, or the reason
    why the tracker could not start.
    """
    run_dir = Path(run_dir)
    if name == "none":
        return Tracker(name, lambda numbers, step: None, lambda: None)
    if name == "tensorboard":
        module = _import(name)
        # Events past the checkpoint were written by the killed run; TensorBoard hides them from purge_step on.
        writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

        def send(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Tracker(name, send, writer.close)

    module, run_id = _import(name), _run_id(run_dir)
    options: dict[str, Any] = {"config": recipes.to_table(recipe), "resume": "allow"}
    folder = run_dir.resolve().name
    if name == "wandb":
        options |= {"project": os.environ.get("WANDB_PROJECT", "truecourse"), "dir": str(run_dir)}
        options |= {"name": folder, "id": run_id}
    else:
        assert name == "trackio", name
        options |= {"project": os.environ.get("TRACKIO_PROJECT", "truecourse"), "embed": False}
        options |= {"name": f"{folder}-{run_id}"}  # trackio knows a run by its name alone
    try:
        module.init(**options)
    except Exception as error:
        raise UserError(
            f"tracker = {name!r} could not start ({type(error).__name__}: {error}); "
            'mend that, or set tracker = "none" in the recipe'
        ) from error
    return Tracker(name, lambda numbers, step: module.log(numbers, step=step), module.finish)


def _import(name: str) -> Any:
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise UserError(f"tracker = {name!r} needs a package: pip install 'truecourse[{name}]' ({error})") from None


def _run_id(run_dir: Path) -> str:
    """The run's id at its tracker, made once, so that a resumed run goes on where the killed one was."""
    path = run_dir / "tracker.json"
    if not path.is_file():
        write_atomically(path, json.dumps({"id": uuid.uuid4().hex[:12]}).encode() + b"\n")
    return json.loads(path.read_bytes())["id"]
