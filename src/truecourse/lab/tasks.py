"""Built-in tasks, named `lab:NAME` in a recipe. This file is a leaf: it imports nothing of the package but its errors.

    sums            two-digit additions to train on, as chats with the column `answer`
    sums-held-out   500 others, of which neither a + b nor b + a is in `sums`
    sums-demos      demonstrations of 250 of `sums`: what the shipped model was fine-tuned on

    sums-pairs, sums-pairs-held-out
                    `sums` and `sums-held-out` as comparisons: `chosen` is the answer, `rejected` one near it

The sum of 47 and 38 is asked as `47+38=` and answered `85`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from truecourse.errors import UserError

HELD_OUT = 500
DEMOS = 250
HELD_OUT_DIGITS = 15


def task(name: str) -> list[dict[str, Any]]:
    """The rows of a built-in task, always the same. Raises `UserError` for an unknown name."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean 'lab:{close[0]}'?" if close else ""
        raise UserError(f"'lab:{name}' is not a built-in task; there are {', '.join(f'lab:{t}' for t in TASKS)}{hint}")
    return TASKS[name]()


def _sums() -> list[dict[str, Any]]:
    return _sides()[0]


def _sums_held_out() -> list[dict[str, Any]]:
    return _sides()[1]


def _sums_demos() -> list[dict[str, Any]]:
    rows = sorted(_sums(), key=lambda row: _shuffled("demo " + row["prompt"][0]["content"]))
    return [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in rows[:DEMOS]
    ]


def _sides() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All 8,100 sums of 10..99 and 10..99 in a fixed random order: those to train on, and those held out.

    a + b goes where b + a goes. Each row has both as its `split_key`, so that a split of a user's own keeps to that.
    """
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    for a, b in sorted(pairs, key=lambda pair: _shuffled(f"{pair[0]}+{pair[1]}")):
        rows = [_sum(*pair) for pair in sorted({(a, b), (b, a)})]
        (held_out if len(held_out) + len(rows) <= HELD_OUT else train).extend(rows)
    return train, held_out


def _sum(a: int, b: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"{a}+{b}="}],
        "answer": str(a + b),
        "split_key": f"{min(a, b)}+{max(a, b)}",
    }


def _sums_pairs() -> list[dict[str, Any]]:
    return [_pair(row) for row in _sums()]


def _sums_pairs_held_out() -> list[dict[str, Any]]:
    return [_pair(row) for row in _sums_held_out()]


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """A sum beside one that is wrong by 1, 2, 10 or 20."""
    near = (-20, -10, -2, -1, 1, 2, 10, 20)
    off = near[_shuffled("wrong " + row["prompt"][0]["content"])[0] % len(near)]
    wrong = int(row["answer"]) + off
    wrong = wrong if wrong > 0 else int(row["answer"]) - off
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (row["answer"], str(wrong)))
    return {**row, "chosen": chosen, "rejected": rejected}


def _digits() -> list[dict[str, Any]]:
    return [row for pair in _digit_pairs()[HELD_OUT_DIGITS:] for row in _both(*pair)]


def _digits_held_out() -> list[dict[str, Any]]:
    return [row for pair in _digit_pairs()[:HELD_OUT_DIGITS] for row in _both(*pair)] * 4


def _digit_pairs() -> list[tuple[int, int]]:
    """The 45 pairs of digits in a fixed random order. No digit is 0: a + 0 ends on its answer when it is repeated."""
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    return sorted(pairs, key=lambda pair: _shuffled(f"{pair[0]}+{pair[1]}"))


def _both(a: int, b: int) -> list[dict[str, Any]]:
    """a + b and b + a, which stay on one side."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {x} + {y}?"}],
            "answer": str(x + y),
            "split_key": f"{a}+{b}",
        }
        for x, y in sorted({(a, b), (b, a)})
    ]


def _shuffled(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


TASKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "sums": _sums,
    "sums-held-out": _sums_held_out,
    "sums-demos": _sums_demos,
    "sums-pairs": _sums_pairs,
    "sums-pairs-held-out": _sums_pairs_held_out,
    "digits": _digits,
    "digits-held-out": _digits_held_out,
}
