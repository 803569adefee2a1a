"""The rewards that come with truecourse: verifiers and shaping parts, in the same forms as a user's own."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from truecourse.errors import UserError
from truecourse.rewards import answers
from truecourse.rewards.checker import Checker, Deadline


class Exact:
    """1 where the completion is the column's text (any of them, if the column holds a list), else 0."""

    def __init__(self, answer: str = "answer", strip: bool = True, case: bool = True) -> None:
        """`strip` ignores white space around both; `case = false` ignores upper and lower case."""
        self.columns = (answer,)
        self._answer, self._strip, self._case = answer, strip, case

    def score(self, completion: str, **row: Any) -> float:
        wanted = row[self._answer]
        wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
        return float(self._plain(completion) in [self._plain(_text(w, self._answer)) for w in wanted])

    def _plain(self, text: str) -> str:
        text = text.strip() if self._strip else text
        return text if self._case else text.casefold()


class Number:
    """1 where the number that the completion ends on is the column's, else 0. See `answers.last_number`."""

    def __init__(self, answer: str = "answer", tolerance: float = 1e-6) -> None:
        """Equal means |a − b| ≤ tolerance."""
        if not 0 <= tolerance < math.inf:
            raise UserError(f"tolerance = {tolerance} must be a number, 0 or above")
        self.columns = (answer,)
        self._answer, self._tolerance = answer, Fraction(tolerance)

    def score(self, completion: str, **row: Any) -> float:
        wanted = answers.last_number(_text(row[self._answer], self._answer))
        if wanted is None:
            raise UserError(f"column {self._answer!r} holds no number: {_short(row[self._answer])}")
        found = answers.last_number(completion)
        return float(found is not None and abs(found - wanted) <= self._tolerance)


class Regex:
    """1 where the pattern matches the completion (anywhere, or all of it with `fullmatch`), else 0.

    A match still running at the deadline counts as none and is logged as `<label>/timeout`: the policy wrote the text.
    """

    def __init__(self, pattern: str, fullmatch: bool = False, deadline: float = 1.0) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"pattern {pattern!r} is not a valid regular expression: {error}") from None
        self.deadline = _deadline(deadline)
        self.checker = Checker("regex", deadline, pattern=pattern, fullmatch=fullmatch)

    def score(self, completion: str, log_metric: Callable[[str, float], None]) -> float:
        try:
            found = self.checker.ask(text=completion)
        except Deadline:
            log_metric("timeout", 1.0)
            return 0.0
        log_metric("timeout", 0.0)
        return float(found)

    def close(self) -> None:
        self.checker.close()


class Math:
    """1 where the completion's final answer equals the column's by math-verify, else 0.

    The answer is found by `answers.final_answer`, in both; without a mark, math-verify searches the whole text. Plain
    numbers are compared here; everything else by math-verify in a process of its own, killed after `deadline` seconds.
    A check that reaches the deadline, or that runs out of memory or stack, is a wrong answer, as the policy wrote it;
    it is logged as `<label>/timeout` or `<label>/error`. If the process itself ends, the sample fails.
    """

    REMEMBERED = 10_000
    """Verdicts kept, so that a group's equal answers are compared once."""

    def __init__(self, answer: str = "answer", deadline: float = 5.0) -> None:
        self.columns = (answer,)
        self.deadline = _deadline(deadline)
        self.checker = Checker("math", deadline)
        self._answer = answer
        self._verdicts: OrderedDict[tuple[str, str], bool | str] = OrderedDict()

    def score(self, completion: str, log_metric: Callable[[str, float], None], **row: Any) -> float:
        gold = _text(row[self._answer], self._answer)
        gold = answers.final_answer(gold) or gold.strip()
        if not gold:
            raise UserError(f"column {self._answer!r} is empty")
        verdict = self._compare(gold, completion)
        log_metric("timeout", float(verdict == "timeout"))
        log_metric("error", float(verdict == "error"))
        return float(verdict is True)

    def close(self) -> None:
        self.checker.close()

    def _compare(self, gold: str, completion: str) -> bool | str:
        marked = answers.final_answer(completion)
        found = completion if marked is None else marked
        if answers.same_text(gold, found):
            return True
        a, b = answers.plain_number(gold), answers.plain_number(found)
        if a is not None and b is not None:
            return a == b or round(a, 6) == round(b, 6)  # math-verify's own rounding
        question = (answers.to_latex(gold), found if marked is None else answers.to_latex(found))
        if question in self._verdicts:
            self._verdicts.move_to_end(question)
            return self._verdicts[question]
        try:
            reply = self.checker.ask(gold=question[0], answer=question[1])
            verdict: bool | str = reply if isinstance(reply, bool) else "error"
        except Deadline:
            verdict = "timeout"
        self._verdicts[question] = verdict
        if len(self._verdicts) > self.REMEMBERED:
            self._verdicts.popitem(last=False)
        return verdict


class Length:
    """−slope · max(0, n − target), with n the completion's tokens (or characters); with `both`, −slope · |n − target|.

    With target 0 it is a price per token; a negative slope pays for length.
    """

    def __init__(
        self,
        target: int = 0,
        slope: float = 0.001,
        unit: Literal["tokens", "characters"] = "tokens",
        both: bool = False,
    ) -> None:
        if target < 0:
            raise UserError(f"target = {target} must be 0 or above")
        if not math.isfinite(slope):
            raise UserError(f"slope = {slope} must be a finite number")
        if unit not in ("tokens", "characters"):
            raise UserError(f"unit = {unit!r} is not 'tokens' or 'characters'")
        self._target, self._slope, self._unit, self._both = target, slope, unit, both

    def score(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        if self._unit == "tokens":
            lengths = [len(ids) for ids in completion_ids]
        else:
            lengths = [len(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
        excess = [n - self._target if not self._both else abs(n - self._target) for n in lengths]
        return [-self._slope * e if e > 0 else 0.0 for e in excess]


class Overlong:
    """Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13), with n the completion's tokens:

    0 for n ≤ max_tokens − soft; (max_tokens − soft − n) / soft up to max_tokens; −1 beyond.
    """

    def __init__(self, max_tokens: int, soft: int) -> None:
        if not 0 < soft <= max_tokens:
            raise UserError(f"soft = {soft} must be above 0 and at most max_tokens = {max_tokens}")
        self._free, self._soft = max_tokens - soft, soft

    def score(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        over = [max(0, len(ids) - self._free) for ids in completion_ids]
        return [max(-1.0, -n / self._soft) if n else 0.0 for n in over]


BUILTINS: dict[str, type] = {
    "exact": Exact,
    "number": Number,
    "regex": Regex,
    "math": Math,
    "length": Length,
    "overlong": Overlong,
}


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UserError(f"column {column!r} holds {_short(value)}; a text or a number is needed")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _deadline(seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise UserError(f"deadline = {seconds} must be above 0 seconds")
    return seconds
