"""The loop around every method: schedule, records, gold, checkpoints, stopping. It knows no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from truecourse.errors import RunError
from truecourse.model.policy import Policy
from truecourse.recipe import Stage
from truecourse.run import checkpoint
from truecourse.run.directory import RunDirectory
from truecourse.run.gold import Gold
from truecourse.run.schedule import learning_rate

Status = Literal["finished", "interrupted", "stopped"]


@dataclass
class StepResult:
    """What one optimiser step leaves behind."""

    record: dict[str, Any]
    """Metrics by name (docs/metrics.md); only what was measured."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Records of the completions sampled in this step."""


class Method(Protocol):
    """What the loop needs of a method."""

    def step(self, step: int, lr: float, phase: Callable[[str], None]) -> StepResult:
        """One optimiser update."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Its own held-out measures, beside the gold."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the policy, as plain JSON values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Display(Protocol):
    """Where progress is shown."""

    def update(self, step: int, record: dict[str, Any]) -> None: ...
    def gold(self, step: int, record: dict[str, Any]) -> None: ...
    def phase(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Loop:
    """One stage of a run. Steps are counted through all stages: this one's first is `offset + 1`."""

    stage: Stage
    index: int
    offset: int
    method: Method
    policy: Policy
    gold: Gold | None
    run: RunDirectory
    display: Display
    log: Callable[[int, dict[str, Any]], None]
    """Sends a record to the tracker."""
    stopping: Callable[[], bool]
    """Whether the user asked to stop after the step in flight."""
    seed: int
    keep: set[int]
    """Steps of earlier stages whose checkpoints stay."""

    def go(self, done: int = 0, *, resumed: bool = False) -> Status:
        """Train from after step `done` of this stage to its end. Raises `RunError` where it cannot go on."""
        stage, best = self.stage, self._best()
        if not resumed:
            best = self._measure(0, best)
            if self._reached(best):
                self.save(0, best)
        if self._reached(best):
            self.display.note(f"the gold reached stop_at = {stage.stop_at:g} at step {self.offset + done}")
            return "stopped"
        if self.stopping() and done < stage.steps:  # the wish came while the stage was being put together
            return "interrupted"
        for at in range(done + 1, stage.steps + 1):
            step, started = self.offset + at, time.perf_counter()
            torch.manual_seed(hash((self.seed, step)))  # adapter dropout is the only torch draw in training
            lr = learning_rate(at, stage.steps, stage.lr, stage.warmup, stage.schedule)
            result = self.method.step(step, lr, self.display.phase)
            record = {"step": step, "stage": self.index, "method": stage.method, **result.record, "lr": lr}
            record |= _costs(time.perf_counter() - started, record, self.policy.device)
            if result.rollouts:
                kind = {"step": step, "stage": self.index, "kind": "train"}
                self.run.rollouts(step, "step", [kind | row for row in result.rollouts])
            self.run.metric(record)
            self._refuse_nan(record)
            self.log(step, record)
            self.display.update(step, record)

            last, is_best = at == stage.steps, False
            if at % stage.gold_every == 0 or last:
                before, best = best, self._measure(at, best)
                is_best = best != before
            every, stopping = stage.checkpoint_every or stage.gold_every, self.stopping()
            if last or is_best or at % every == 0 or stopping or self._reached(best):
                self.save(at, best)
            if self._reached(best) and not last:
                self.display.note(f"the gold reached stop_at = {stage.stop_at:g} at step {step}")
                return "stopped"
            if stopping and not last:
                return "interrupted"
        return "finished"

    # -- gold

    def _measure(self, at: int, best: tuple[float, int] | None) -> tuple[float, int] | None:
        """Measure the gold; returns (value, step) of the best so far, the earlier one among equals."""
        step = self.offset + at
        started = time.perf_counter()
        own = self.method.evaluate()
        if self.gold is None and not own:
            return best
        self.display.phase("measuring the gold")
        record: dict[str, Any] = {"step": step, "stage": self.index, **own}
        value = None
        if self.gold is not None:
            measured = self.gold.measure(self.policy, (self.seed, 0))
            kind = {"step": step, "stage": self.index, "kind": "gold"}
            rows = [kind | row for row in measured.rows]
            if at == 0 and self.index:  # the last step of the stage before has the same number, and rows of its own
                rows = [row for row in self.run.read_rollouts(step, "gold") if row["stage"] != self.index] + rows
            self.run.rollouts(step, "gold", rows)
            record |= measured.record
            value = measured.record[f"gold/{self.gold.name}"]
        record["time/gold"] = time.perf_counter() - started
        self.run.eval(record)
        self.log(step, {k: v for k, v in record.items() if k not in ("step", "stage")})
        self.display.gold(step, record)
        return (value, step) if value is not None and (best is None or value > best[0]) else best

    def _best(self) -> tuple[float, int] | None:
        """The best gold of this stage so far, from its records."""
        if self.gold is None:
            return None
        key, best = f"gold/{self.gold.name}", None
        for record in self.run.evals():
            if record["stage"] == self.index and (best is None or record[key] > best[0]):
                best = (record[key], record["step"])
        return best

    def _reached(self, best: tuple[float, int] | None) -> bool:
        return bool(self.stage.stop_at and best and best[0] >= self.stage.stop_at)

    # -- checkpoints

    def save(self, at: int, best: tuple[float, int] | None) -> None:
        """Write a checkpoint whole or not at all, then drop all but the last and the best by gold."""
        step = self.offset + at
        moving = bool(getattr(self.stage, "reference_every", 0))
        self.display.phase("writing a checkpoint")

        def write(folder: Any) -> None:
            self.policy.save(folder)
            state = {"step": step, "stage": self.index, "stage_step": at, "version": self.policy.version}
            checkpoint.save_state(
                folder, self.policy.state(moving_reference=moving), state | {"method": self.method.state()}
            )

        checkpoint.save(self.run.path, step, write)
        checkpoint.prune(self.run.path, self.keep | {step} | ({best[1]} if best else set()))

    def restore(self, folder: Any) -> int:
        """Continue from a checkpoint of this stage; returns its step in the stage."""
        tensors, state = checkpoint.load_state(folder)
        assert state["stage"] == self.index
        self.policy.load_state(tensors, state["version"])
        self.method.load_state(state["method"])
        return state["stage_step"]

    def _refuse_nan(self, record: dict[str, Any]) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(record.get(key, 0.0)):
                raise RunError(
                    f"{key} is {record[key]} at step {record['step']}; the last checkpoint is whole. "
                    "Lower lr or max_grad_norm, or look at this step's completions in rollouts/"
                )


def _costs(seconds: float, record: dict[str, Any], device: torch.device) -> dict[str, float]:
    import resource

    costs: dict[str, float] = {"time/step": seconds}
    if "tokens/completion" in record:
        costs["tokens/per_second"] = record["tokens/completion"] / seconds
    if device.type == "cuda":
        costs["memory/peak"] = torch.cuda.max_memory_allocated(device)
    else:
        costs["memory/peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return costs
