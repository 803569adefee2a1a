"""Calls into the user's code: in order, each under a deadline, in a thread that can be left behind.

Python cannot stop a thread. A call that outlives its deadline is abandoned with its thread (a daemon, so it never keeps
the process alive) and the next call gets a fresh one. What a thread cannot bound is a call that never gives up the
interpreter lock, such as one huge power or one catastrophic regular expression: those belong in a process of their own
(`checker.py`), as the built-in `regex` and `math` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truecourse.errors import UserError

MAX_HANGS = 3
"""Calls of one batch that may hang before the rest fail at once, so that a run never waits samples × timeout."""
_GRACE = 1.0  # seconds beyond its deadline after which an event loop that cancels nothing is held to be blocked

Call = Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """What one call came to: a value, or the reason why there is none."""

    value: Any = None
    reason: str = ""
    traceback: str = ""
    interrupt: bool = False
    at: float = 0.0
    """`time.perf_counter()` when it ended."""


class Caller:
    """Runs the calls of one part of a reward in a daemon thread of its own."""

    def __init__(self, label: str, timeout: float, *, is_async: bool = False) -> None:
        self.label, self.timeout, self.is_async = label, timeout, is_async
        self._thread: _Thread | None = None
        self._started: tuple[Sequence[Call], queue.SimpleQueue, float] | None = None

    def start(self, calls: Sequence[Call]) -> None:
        """Hand over the calls; `finish` waits for them. Async calls of one batch run concurrently in one event loop,
        which is kept from batch to batch so that clients bound to it stay usable."""
        self._started = (calls, self._submit(list(enumerate(calls))), time.perf_counter())

    def finish(self) -> tuple[list[Outcome], float]:
        """Outcomes in the order of the calls, and the seconds that they took. KeyboardInterrupt passes through."""
        assert self._started is not None, "start first"
        calls, results, began = self._started
        self._started = None
        outcomes: dict[int, Outcome] = {}
        hangs = 0
        try:
            while len(outcomes) < len(calls):
                try:
                    i, outcome = results.get(timeout=self.timeout + (_GRACE if self.is_async else 0.0))
                    if outcome.interrupt:
                        raise KeyboardInterrupt
                    outcomes[i] = outcome
                except queue.Empty:
                    left = [i for i in range(len(calls)) if i not in outcomes]
                    hung = self._hung()
                    self.abandon()
                    hangs += 1
                    outcomes[left[0]] = hung
                    if self.is_async:  # which coroutine blocks the loop cannot be told: none of the rest has a result
                        outcomes |= dict.fromkeys(left, hung)
                    elif hangs == MAX_HANGS:
                        reason = f"not called: {hangs} calls of this batch hung for {self.timeout:g} s each"
                        outcomes |= {i: Outcome(reason=reason, traceback=hung.traceback) for i in left[1:]}
                    else:
                        results = self._submit([(i, calls[i]) for i in left[1:]])
        except BaseException:
            self.abandon()
            raise
        ended = max((o.at for o in outcomes.values()), default=began) if hangs == 0 else time.perf_counter()
        return [outcomes[i] for i in range(len(calls))], ended - began

    def abandon(self) -> None:
        """Leave the thread behind, with whatever it is doing."""
        if self._thread is not None:
            self._thread.leave()
        self._thread = None

    def _submit(self, calls: list[tuple[int, Call]]) -> queue.SimpleQueue:
        if self._thread is None:
            self._thread = _Thread(self.label, self.timeout, self.is_async)
        results: queue.SimpleQueue = queue.SimpleQueue()
        self._thread.inbox.put((calls, results))
        return results

    def _hung(self) -> Outcome:
        thread = self._thread
        frame = sys._current_frames().get(thread.ident or 0) if thread else None
        stack = [f for f in traceback.extract_stack(frame) if not _ours(f.filename)] if frame else []
        where = f" at {Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else ""
        what = "blocked its event loop" if self.is_async else "had not returned"
        return Outcome(
            reason=f"timeout: {what} after {self.timeout:g} s{where}",
            traceback="Stack of the call when it was abandoned:\n" + "".join(traceback.format_list(stack)),
        )


class _Thread(threading.Thread):
    def __init__(self, label: str, timeout: float, is_async: bool) -> None:
        super().__init__(name=f"reward-{label}", daemon=True)
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._timeout, self._is_async = timeout, is_async
        self._left = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gathered: asyncio.Future | None = None
        self.start()

    def leave(self) -> None:
        self._left.set()
        self.inbox.put(None)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(lambda: self._gathered and self._gathered.cancel())

    def run(self) -> None:
        if self._is_async:
            self._loop = asyncio.new_event_loop()
        try:
            while (job := self.inbox.get()) is not None:
                calls, results = job
                if self._loop is not None:
                    self._loop.run_until_complete(self._gather(calls, results))
                    continue
                for i, call in calls:
                    if self._left.is_set():
                        return
                    results.put((i, _attempt(call)))
        finally:
            if self._loop is not None:
                self._loop.close()

    async def _gather(self, calls: list[tuple[int, Call]], results: queue.SimpleQueue) -> None:
        async def one(i: int, call: Callable[[], Awaitable[Any]]) -> None:
            try:
                async with asyncio.timeout(self._timeout) as scope:
                    results.put((i, Outcome(value=await call(), at=time.perf_counter())))
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError) and self._left.is_set():
                    raise
                if isinstance(error, TimeoutError) and scope.expired():
                    reason = f"timeout: had not returned after {self._timeout:g} s"
                    results.put((i, Outcome(reason=reason, traceback=_format(error), at=time.perf_counter())))
                else:
                    results.put((i, _failed(error)))

        self._gathered = asyncio.gather(*(one(i, call) for i, call in calls))
        with contextlib.suppress(asyncio.CancelledError):  # abandoned
            await self._gathered


def _attempt(call: Call) -> Outcome:
    try:
        return Outcome(value=call(), at=time.perf_counter())
    except BaseException as error:  # SystemExit included: a reward does not end the run unasked
        return _failed(error)


def _failed(error: BaseException) -> Outcome:
    if isinstance(error, UserError):  # the message says it all
        return Outcome(reason=str(error), at=time.perf_counter())
    trace = _format(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _ours(f.filename)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    reason = f"{type(error).__name__}: {error}{where}"
    return Outcome(
        reason=reason, traceback=trace, interrupt=isinstance(error, KeyboardInterrupt), at=time.perf_counter()
    )


def _format(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and _ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


_PACKAGE = str(Path(__file__).parent)
_STDLIB = (threading.__file__, queue.__file__, str(Path(asyncio.__file__).parent))


def _ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE, *_STDLIB))
