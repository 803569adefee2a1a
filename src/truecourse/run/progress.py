"""What a person sees while a run trains: on stderr, so that stdout stays free for results.

On a terminal, two live lines with what is in flight; elsewhere (a log file, CI) plain lines, at most one every ten
seconds and one at each gold measurement, free of control characters.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

EVERY = 10.0
"""Seconds between two plain lines."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Progress:
    """`with Progress(total, done, title) as progress:` around the steps after `done`, up to `total`.

    Shows what the records hold and nothing else: reward, gold, loss where there is no reward, KL, length, tokens per
    second, time left. `update(step, record)` after each optimiser step, `gold(step, record)` after each gold
    measurement, `phase(text)` for what is in flight ("sampling 512 tokens"), `note(text)` for a line that stays.
    With `quiet` only notes are printed. An exception or Ctrl-C leaves the terminal as it was.
    """

    def __init__(
        self, total: int, done: int = 0, title: str = "", quiet: bool = False, file: TextIO | None = None
    ) -> None:
        self.total, self.title, self.quiet = total, title, quiet
        self._file = file or sys.stderr
        self._step = done
        self._record: Mapping[str, Any] = {}
        self._gold: dict[str, float] = {}
        self._start: dict[str, float] = {}
        self._phase = ""
        self._times: deque[tuple[float, int]] = deque(maxlen=32)
        self._printed = -EVERY
        self._live: Any = None

    def __enter__(self) -> Progress:
        self._times.append((time.monotonic(), self._step))
        if not self.quiet and self._file.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._file)
            if not console.is_dumb_terminal:
                # Results on stdout must not be drawn into a stderr that is another place.
                redirect = sys.stdout.isatty()
                self._live = Live(
                    get_renderable=self._render, console=console, redirect_stdout=redirect, refresh_per_second=4
                )
                self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._phase = ""
        if self._live:
            self._live.stop()
            self._live = None

    # -- what happened -----------------------------------------------------------------------------------------------

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Optimiser step `step` is done, with its metrics."""
        self._step, self._record, self._phase = step, record, ""
        now = time.monotonic()
        if len(self._times) == 1:  # a resumed run begins past `done`
            self._times[0] = (self._times[0][0], step - 1)
        self._times.append((now, step))
        if not self._live and (now - self._printed >= EVERY or (step >= self.total and not self._gold)):
            self._line()

    def gold(self, step: int, record: Mapping[str, Any]) -> None:
        """The gold was measured after `step`: a line that stays."""
        self._phase = ""
        self._take_gold(record)
        if len(self._times) == 1:  # what comes before the first step is no part of a step's time
            self._times[0] = (time.monotonic(), step)
        if not self.quiet and self._gold:
            self._line(step)

    def recall(self, evals: Iterable[Mapping[str, Any]]) -> None:
        """The gold measurements made before a resume, so that the first and the last are shown from the start."""
        for record in evals:
            self._take_gold(record)

    def phase(self, text: str) -> None:
        """What is in flight; shown on a terminal only."""
        self._phase = text

    def note(self, text: str) -> None:
        """A line that stays, above the live ones."""
        self._say(text)

    # -- how it looks ------------------------------------------------------------------------------------------------

    def fields(self) -> list[str]:
        """What the last records tell, in the order shown: "reward 0.53", "gold exact 0.31 → 0.42", ..."""
        record, shown = self._record, []
        if "reward/mean" in record:
            shown.append(f"reward {_number(record['reward/mean'])}")
        shown += self._golds()
        if "reward/mean" not in record and "loss" in record:
            shown.append(f"loss {_number(record['loss'])}")
        for label, key in (("KL", "kl/ref"), ("length", "length/mean")):
            if key in record:
                shown.append(f"{label} {_number(record[key])}")
        if "tokens/per_second" in record:
            shown.append(f"{record['tokens/per_second']:,.0f} tokens/s")
        return shown

    def left(self) -> float | None:
        """Seconds that the remaining steps will take at the pace of the last ones, gold included; None at first."""
        (then, before), (now, step) = self._times[0], self._times[-1]
        return (self.total - step) * (now - then) / (step - before) if step > before else None

    def _take_gold(self, record: Mapping[str, Any]) -> None:
        """Keep each `gold/<name>` (`gold/<name>/low` and `/high` are its interval) and SFT's held-out loss."""
        self._gold = {f"gold {key[5:]}": value for key, value in record.items() if re.fullmatch("gold/[^/]+", key)}
        if "loss/held_out" in record:
            self._gold["held-out loss"] = record["loss/held_out"]
        for name, value in self._gold.items():
            self._start.setdefault(name, value)

    def _golds(self) -> list[str]:
        return [
            f"{name} " + (f"{_number(first)} → " if (first := self._start[name]) != value else "") + _number(value)
            for name, value in self._gold.items()
        ]

    def _left(self) -> str:
        left = self.left()
        return "" if left is None else f"{_duration(left)} left"

    def _head(self, step: int | None = None) -> str:
        return f"step {self._step if step is None else step:>{len(str(self.total))}}/{self.total}"

    def _line(self, step: int | None = None) -> None:
        if not self.quiet:
            self._say("  ".join(filter(None, [self._head(step), *self.fields(), self._left()])))
            self._printed = time.monotonic()

    def _say(self, text: str) -> None:
        text = CONTROL.sub("�", text)
        if self._live:
            from rich.text import Text

            self._live.console.print(Text(text))
        else:
            print(text, file=self._file, flush=True)

    def _render(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total, completed=self._step, width=20)
        phase = Text(self._phase, style="dim", no_wrap=True, overflow="ellipsis")
        top.add_row(Text(self.title, style="bold", no_wrap=True), self._head(), bar, self._left(), phase)
        whole = Table.grid()
        whole.add_row(top)
        whole.add_row(Text("  ".join(self.fields())))
        return whole


def _number(value: Any) -> str:
    """Three significant digits, never in exponents that a person must decode: 0.531, 34.2, 1,280, 0.00012."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) or value != value or value in (float("inf"), float("-inf")):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01 or size == 0:
        return f"{value:.3f}"
    return f"{value:.2g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
