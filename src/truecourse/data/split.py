"""Training rows and held-out rows: the same prompt never stands on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from truecourse.data.formats import prompt_key, prompt_text
from truecourse.data.sources import Row
from truecourse.errors import UserError


def split(rows: Sequence[Row], held_out: int | float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """`(train, held_out)`, each in the order of `rows`.

    A row's side follows from a hash of its prompt (see `formats.prompt_key`) and `seed`, so it does not depend on the
    row's place, and rows with the same prompt, or the same `split_key`, stay together.

    held_out: a float in (0, 1) is a share: each prompt is held out with that probability, and keeps its side when rows
        are added. An int is a count of distinct prompts (a few more where `split_key` ties the last ones to others).
        0 holds nothing out.

    Raises `UserError` where a side would be empty.
    """
    if held_out == 0:
        return list(rows), []
    keys = [prompt_key(row) for row in rows]
    order = {key: _hash(key, seed) for key in keys}
    if isinstance(held_out, float):
        if not 0 < held_out < 1:
            raise UserError(f"held_out = {held_out} is not a share between 0 and 1; a count has no decimal point")
        chosen = {key for key, value in order.items() if value < held_out * 2**64}
    else:
        if held_out < 0:
            raise UserError(f"held_out = {held_out} is negative")
        chosen = _first(held_out, rows, keys, order)
    train = [row for row, key in zip(rows, keys, strict=True) if key not in chosen]
    held = [row for row, key in zip(rows, keys, strict=True) if key in chosen]
    if not train or not held:
        raise UserError(
            f"held_out = {held_out} of {len(rows)} rows with {len(order)} distinct prompts leaves "
            f"{'nothing to train on' if not train else 'nothing held out'}; "
            f"give a {'smaller' if not train else 'larger'} share or count, or a file of held-out rows"
        )
    return train, held


def _first(count: int, rows: Sequence[Row], keys: Sequence[str], order: dict[str, int]) -> set[str]:
    """Keys in the order of their hashes, until they hold `count` distinct prompts."""
    prompts: dict[str, set[str]] = {}
    for row, key in zip(rows, keys, strict=True):
        prompts.setdefault(key, set()).add(prompt_text(row))
    chosen, total = set(), 0
    for key in sorted(order, key=lambda k: (order[k], k)):
        if total >= count:
            break
        chosen.add(key)
        total += len(prompts[key])
    return chosen


def leaks(train: Sequence[Row], held_out: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Held-out rows whose prompt, or whose `split_key`, is also trained on, each with the first such training row."""
    seen: dict[str, Row] = {}
    for row in train:
        for key in (prompt_key(row), prompt_text(row)):
            seen.setdefault(key, row)
    found = []
    for row in held_out:
        twin = seen.get(prompt_key(row)) or seen.get(prompt_text(row))
        if twin is not None:
            found.append((twin, row))
    return found


def _hash(key: str, seed: int) -> int:
    """64 bits, the same on every machine and in every version."""
    return int.from_bytes(blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
