"""A mixture of scored parts, and what comes of scoring completions with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from truecourse.data.sequences import Completion, Prompt
from truecourse.errors import UserError
from truecourse.recipe import RewardPart
from truecourse.rewards.builtins import BUILTINS
from truecourse.rewards.calls import Call, Caller, Outcome
from truecourse.rewards.forms import BadScore, Form, Score, form_of, load, nearest, read_batch, read_score


@dataclass(frozen=True)
class Failure:
    """One completion that one part could not score."""

    part: str
    prompt_index: int
    """`Prompt.index`: the row in its data set."""
    sample: int
    """Place in the prompt's group."""
    reason: str
    traceback: str = ""
    """The user's frames; empty where nothing was raised."""


@dataclass(frozen=True)
class Scores:
    """The scores of P prompts' completions, in order; groups may differ in size."""

    values_PG: list[list[float]]
    """Σ weight · part. NaN where a part with a weight failed, and where no part applied: such a sample belongs in no
    statistic of its group."""
    parts: dict[str, list[list[float | None]]]
    """{label or label/name: raw scores, unweighted}. NaN where it failed, None where it did not apply."""
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """{label: wall time of its calls}. Async parts run beside the others."""
    steps: dict[str, list[list[list[float] | None]]] = field(default_factory=dict)
    """{label: step or token scores of each completion}, for the parts that return them."""
    notes: dict[str, float] = field(default_factory=dict)
    """{label/name: mean of what the part gave `log_metric`}, such as `math/timeout`."""
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)
    """{label/column: values that the part gave `log_extra`, one per completion}."""

    @property
    def failed_share(self) -> float:
        """Share of the completions that at least one part failed to score."""
        failed = [any(map(_is_nan, cell)) for cell in self._cells()]
        return sum(failed) / len(failed) if failed else 0.0

    @property
    def unscored(self) -> int:
        """Completions without a failure to which no part applied."""
        values = [v for row in self.values_PG for v in row]
        return sum(math.isnan(v) and not any(map(_is_nan, cell)) for v, cell in zip(values, self._cells(), strict=True))

    def _cells(self) -> list[list[float | None]]:
        return [
            [part[p][g] for part in self.parts.values()]
            for p, row in enumerate(self.values_PG)
            for g in range(len(row))
        ]


class RewardError(UserError):
    """Too large a share of scores failed; `traceback` is the first one's."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


def check_failures(scores: Scores, limit: float) -> None:
    """Raise `RewardError` where more than the share `limit` of the completions failed."""
    if scores.failed_share <= limit:
        return
    by_part: dict[str, list[Failure]] = {}
    for failure in scores.failures:
        by_part.setdefault(failure.part, []).append(failure)
    label, failures = max(by_part.items(), key=lambda item: len(item[1]))
    first, total = failures[0], sum(map(len, scores.values_PG))
    hung = next((f for f in failures if f.reason.startswith("timeout")), None)
    if hung:
        fix = f"make it faster or raise `timeout` of reward {label!r}"
    elif "signal only works in main thread" in first.reason:
        fix = "it sets a signal, which only the main thread may do: switch its own timeout off (`timeout` bounds it)"
    elif "needs the column" in first.reason:
        fix = "add the column to the data, or give the parameter a default"
    else:
        fix = "mend the function"
    raise RewardError(
        f"reward {label!r} failed on {len(failures)} of {total} completions ({len(failures) / total:.1%}; the limit is "
        f"{limit:.1%} of them). First: prompt {first.prompt_index}, sample {first.sample}: {first.reason}. "
        f"To go on: {fix}" + (", or allow a larger share with max_reward_failures" if limit else ""),
        next((f.traceback for f in failures if f.traceback), ""),
    )


_TAKEN = ("mean", "std", "failed")


@dataclass
class _Part:
    label: str
    weight: float
    target: Any
    form: Form
    caller: Caller


class Reward:
    """A weighted mixture of parts. Made by `build`."""

    def __init__(self, parts: Sequence[_Part], tokens_of: Callable[[Completion], Sequence[int]] | None = None) -> None:
        self._parts = list(parts)
        self._tokens_of = tokens_of or (lambda completion: completion.tokens)

    @property
    def labels(self) -> list[str]:
        return [part.label for part in self._parts]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise `UserError` where a part needs a column that the data does not have."""
        columns = list(columns)
        for part in self._parts:
            for name in part.form.columns:
                if name not in columns:
                    hint = nearest(name, columns) or "; the data has no columns beside the prompt"
                    raise UserError(f"reward {part.label!r} needs the column {name!r}{hint}")

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> Scores:
        """Scores of each prompt's completions, P × G (ragged). Nothing that a reward does raises here, except
        KeyboardInterrupt: see `Scores.failures` and `check_failures`."""
        assert len(prompts) == len(completions), "one group of completions for each prompt"
        samples = [
            (prompt, g, completion)
            for prompt, group in zip(prompts, completions, strict=True)
            for g, completion in enumerate(group)
        ]
        sizes = [len(group) for group in completions]
        runs = [_Run(part, samples, self._tokens_of) for part in self._parts]
        try:
            for run in runs:
                if run.part.form.is_async:  # these wait on the network: let them, beside the others
                    run.start()
            for run in runs:
                run.finish()
        except BaseException:
            for part in self._parts:
                part.caller.abandon()
            raise

        scores = Scores(values_PG=_ragged([_mix(runs, i) for i in range(len(samples))], sizes), parts={})
        for run in runs:
            label = run.part.label
            scores.parts[label] = _ragged([s.value for s in run.scores], sizes)
            for name in dict.fromkeys(name for s in run.scores for name in s.named):
                # A sample that failed has no names; it failed in each of them.
                values = [s.named.get(name, s.value if _is_nan(s.value) else None) for s in run.scores]
                scores.parts[f"{label}/{name}"] = _ragged(values, sizes)
            if any(s.steps for s in run.scores):
                scores.steps[label] = _ragged([s.steps for s in run.scores], sizes)
            scores.failures.extend(run.failures)
            scores.seconds[label] = run.seconds
            scores.notes.update({f"{label}/{k}": math.fsum(v) / len(v) for k, v in list(run.notes.items())})
            scores.columns.update({f"{label}/{k}": _ragged(v, sizes) for k, v in run.extra.items()})
        return scores

    def close(self) -> None:
        """End the threads and processes that the parts keep between calls."""
        for part in self._parts:
            part.caller.abandon()
            if callable(getattr(part.target, "close", None)):
                part.target.close()


def build(
    parts: Sequence[RewardPart],
    *,
    tokens_of: Callable[[Completion], Sequence[int]] | None = None,
    base: Path | None = None,
) -> Reward:
    """The reward that a recipe's parts describe.

    `base` is the recipe's folder: files in `use` are relative to it, modules are also looked for there. `tokens_of`
    gives the ids that count as a completion's tokens; its own by default. Raises `UserError` for what cannot be found
    or called, and for arguments that a part does not take.
    """
    base = Path.cwd() if base is None else Path(base)
    modules: dict[str, ModuleType] = {}
    made: list[_Part] = []
    for part in parts:
        part.check()
        label, where = part.label, f"reward {part.label!r}"
        if any(label == other.label for other in made):
            raise UserError(f"two rewards are called {label!r}; give one of them another `name`")
        if "/" in label:
            raise UserError(f"{where}: a name cannot hold '/', which separates a part from its own parts")
        if label in _TAKEN:
            raise UserError(f"{where}: reward/{label} is a metric of the whole reward; give this part another `name`")
        if not math.isfinite(part.weight):
            raise UserError(f"{where}: weight = {part.weight} must be a finite number")
        target = load(part, base, modules)
        deadline = getattr(target, "deadline", None)
        if part.use in BUILTINS and deadline is not None and deadline >= part.timeout:
            raise UserError(f"{where}: timeout = {part.timeout:g} must be above its deadline = {deadline:g}")
        form = form_of(target, where)
        made.append(_Part(label, part.weight, target, form, Caller(label, part.timeout, is_async=form.is_async)))
    if not any(part.weight for part in made):
        raise UserError("every reward has weight 0, so there is nothing to score; give one a weight")
    return Reward(made, tokens_of)


class _Run:
    """One part's calls on one set of samples."""

    def __init__(self, part: _Part, samples: list[tuple[Prompt, int, Completion]], tokens_of: Callable) -> None:
        self.part, self.samples, self._tokens_of = part, samples, tokens_of
        self.scores: list[Score] = []
        self.failures: list[Failure] = []
        self.notes: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}
        self.seconds = 0.0
        self._started = False

    def start(self) -> None:
        self._started = True
        if not self.samples:
            calls: list[Call] = []
        elif self.part.form.batch:
            calls = [self._call_batch]
        else:
            calls = [functools.partial(self._call_one, *sample) for sample in self.samples]
        self.part.caller.start(calls)

    def finish(self) -> None:
        if not self._started:
            self.start()
        outcomes, self.seconds = self.part.caller.finish()
        if self.part.form.batch and outcomes:
            outcomes = self._split(outcomes[0])
        for (prompt, g, _), outcome in zip(self.samples, outcomes, strict=True):
            reason, score = outcome.reason, Score(math.nan)
            if not reason:
                try:
                    score = read_score(outcome.value)
                except BadScore as error:
                    reason = str(error)
            self.scores.append(score)
            if reason:
                self.failures.append(Failure(self.part.label, prompt.index, g, reason, outcome.traceback))

    def _split(self, outcome: Outcome) -> list[Outcome]:
        if not outcome.reason:
            try:
                return [Outcome(value=v) for v in read_batch(outcome.value, len(self.samples))]
            except BadScore as error:
                outcome = Outcome(reason=str(error))
        return [outcome] * len(self.samples)

    def _call_one(self, prompt: Prompt, g: int, completion: Completion) -> Any:
        form = self.part.form
        given = {"prompt": prompt.content, "completion": completion.text}
        if "log_metric" in form.names:
            given["log_metric"] = self._log_metric  # type: ignore[assignment]
        return form.function(**form.arguments(prompt.row, given))

    def _call_batch(self) -> Any:
        form = self.part.form
        names = dict.fromkeys(name for prompt, _, _ in self.samples for name in prompt.row)
        given = {
            "prompts": [prompt.content for prompt, _, _ in self.samples],
            "completions": [
                c.text if isinstance(p.content, str) else [{"role": "assistant", "content": c.text}]
                for p, _, c in self.samples
            ],
            "completion_ids": [list(self._tokens_of(c)) for _, _, c in self.samples],
            "log_metric": self._log_metric,
            "log_extra": self._log_extra,
        }
        columns = {name: [prompt.row.get(name) for prompt, _, _ in self.samples] for name in names}
        return form.function(**form.arguments(columns, given))

    def _log_metric(self, name: str, value: float) -> None:
        self.notes.setdefault(name, []).append(float(value))

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.samples):
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(self.samples)} completions")
        self.extra[column] = list(values)


def _mix(runs: Sequence[_Run], i: int) -> float:
    """Σ weight · score over the parts that apply to sample i; NaN if none does. A part of weight 0 is only logged."""
    scored = [(run.part.weight, run.scores[i].value) for run in runs]
    terms = [weight * value for weight, value in scored if weight and value is not None]
    return math.fsum(terms) if terms else math.nan


def _ragged(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    rows, start = [], 0
    for size in sizes:
        rows.append(list(flat[start : start + size]))
        start += size
    return rows


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)
