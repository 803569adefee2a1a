"""The child process of `checker.Checker`. Run as a script; imports nothing of truecourse, so that it starts fast.

It imports what the check needs once, then forks; the fork answers questions. A check that uses up its CPU time is ended
by the kernel (a timer signal with its default action, which also ends one long C call), and the parent here says so and
forks again, which costs milliseconds where a fresh start would cost the imports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

MEMORY = 2 << 30
"""Bytes of address space: 10**10**10 ends in a MemoryError, not in the machine's last page."""


def math() -> Callable[..., bool]:
    """The comparison of math-verify, without its own timeouts, which are signals: this process has a deadline."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)

    def check(gold: str, answer: str) -> bool:
        wanted = parse(gold, parsing_timeout=None)
        return bool(wanted) and verify(wanted, parse(answer, parsing_timeout=None), timeout_seconds=None)

    for answer in (r"\boxed{\frac{1}{2}}", "$x+1$", "so 2"):  # fills the caches that every fork starts with
        check(r"\boxed{x^2}", answer)
    return check


def regex(pattern: str, fullmatch: bool) -> Callable[..., bool]:
    compiled = re.compile(pattern)
    find = compiled.fullmatch if fullmatch else compiled.search
    return lambda text: find(text) is not None


def serve(check: Callable[..., bool], deadline: float, replies: TextIO) -> None:
    """Answer one question after another until there are no more."""
    while line := sys.stdin.buffer.readline():
        question = json.loads(line)
        number = question.pop("id")
        signal.setitimer(signal.ITIMER_PROF, deadline)
        try:
            value: Any = check(**question)
        except Exception as error:  # MemoryError and RecursionError too: the text asked for them
            value = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(replies, {"id": number, "value": value})


def say(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def main(kind: str, deadline: str, setting: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    faulthandler.enable()
    with contextlib.suppress(ImportError, ValueError, OSError):  # without the limit, the deadline remains
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    make: Callable[..., Callable[..., bool]] = math if kind == "math" else regex
    check = make(**json.loads(setting))
    say(replies, {"ready": True})
    while True:
        pid = os.fork()
        if pid == 0:
            serve(check, float(deadline), replies)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:  # no more questions
            return
        say(replies, {"ended": signal.Signals(-status).name if status < 0 else f"status {status}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
