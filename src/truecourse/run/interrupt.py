"""Ctrl-C and SIGTERM as a wish to stop after the step in flight."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """`with StopFlag() as flag: ... if flag.requested: save and leave`.

    The first SIGINT or SIGTERM makes `requested` true and says so through `notify`; the second raises
    `KeyboardInterrupt` there and then. The handlers that were in place come back at the end. Python lets only the main
    thread handle signals: elsewhere nothing is ever requested.
    """

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self.signal: signal.Signals | None = None
        """Which signal came first; None while none has."""
        self.notify = notify or _write
        """Where the news goes: by default stderr, past Python's buffers. A live display wants it through its `note`."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after the step in flight."""
        return self.signal is not None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        text = "stopping after the step in flight; press Ctrl-C again to quit at once"
        try:
            self.notify(text)
        except RuntimeError:  # the signal came inside a buffered write to the same stream
            _write(text)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{text}\n".encode())
