"""A persistent child process that answers questions under a hard deadline.

For checks whose time the policy decides: a parser or a regular expression given hostile text can run for hours inside
one C call, where neither a thread nor a Python signal handler reaches it. The kernel ends such a check (see
`check_worker.py`), and the next question is answered a few milliseconds later. Questions and answers are JSON lines
over pipes; nothing is pickled, and this process is never forked. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("check_worker.py")
_STARTUP = 60.0  # seconds for the imports of a fresh child, on a busy machine


class Deadline(Exception):
    """The check did not answer in time; its process was ended."""


class CheckerCrash(RuntimeError):
    """The checking process ended by itself; the message holds the end of what it said."""


class Checker:
    """One child for one kind of check (`math` or `regex`), started at the first question.

    `deadline` is in seconds of CPU time, so that a busy machine does not change verdicts; a check that gets no CPU is
    given up after 4 · deadline + 5 seconds of wall time.
    """

    def __init__(self, kind: str, deadline: float, **setting: Any) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._argv = [sys.executable, "-P", str(_WORKER), kind, str(deadline), json.dumps(setting)]
        self._patience = 4 * deadline + 5
        self._lock = threading.Lock()
        self._asked = 0

    def ask(self, **question: Any) -> Any:
        """The child's answer. Raises `Deadline` where the check reached it and `CheckerCrash` if the child ended."""
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                self._asked += 1
                self._send({"id": self._asked} | question)
                while True:
                    reply = self._read(self._patience)
                    if reply.get("ended") == "SIGPROF":
                        raise Deadline
                    if "ended" in reply:
                        raise CheckerCrash(f"the checking process ended with {reply['ended']}{self._said()}")
                    if reply["id"] == self._asked:  # an older one answers a question already given up
                        return reply["value"]
            except (Deadline, CheckerCrash):
                raise
            except BaseException:  # an interrupt: half an answer must not meet the next question
                self.close()
                raise

    def close(self) -> None:
        """End the child; a later question starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # a Ctrl-C in the terminal is the run's to handle
        )
        self._buffer = b""
        try:
            self._read(_STARTUP)
        except Deadline:
            raise CheckerCrash(f"the checking process was not ready after {_STARTUP:g} s") from None

    def _send(self, question: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _read(self, seconds: float) -> Any:
        assert self._process is not None and self._process.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not ready.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise Deadline
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    raise self._gone()
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _gone(self) -> CheckerCrash:
        assert self._process is not None
        crash = CheckerCrash(f"the checking process ended with status {self._process.wait()}{self._said()}")
        self.close()
        return crash

    def _said(self) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()[-1500:]
        return f": {said}" if said else ""
