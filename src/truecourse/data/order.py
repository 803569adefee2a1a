"""Which rows a step uses: a pure function of an integer, so that a resumed run needs to store nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from truecourse.errors import UserError


def take(cursor: int, count: int, size: int, seed: int) -> list[int]:
    """Indices (0..size − 1) of the rows at places `cursor` to `cursor + count − 1` of an endless sequence of epochs.

    Every epoch is a permutation of the rows of its own, keyed by (seed, epoch). A step that needs `count` rows goes on
    from `cursor + count`.
    """
    assert size > 0 and cursor >= 0 and count >= 0
    return [int(_epoch(place // size, size, seed)[place % size]) for place in range(cursor, cursor + count)]


def fingerprint(sequences: Iterable[Sequence[int]]) -> str:
    """A digest of these token sequences, in this order."""
    digest = blake2b(digest_size=16)
    for tokens in sequences:
        digest.update(np.array([len(tokens), *tokens], dtype="<u4").tobytes())
    return digest.hexdigest()


def refuse_other_data(before: str, now: str) -> None:
    """Raise `UserError` where a run is resumed on other training data than it began with."""
    if before != now:
        raise UserError(
            "the training data, or how it is tokenised, is no longer what this run began with, so it cannot go on as "
            "the same run; bring the data back, or start a new run from this one's weights (model = its folder)"
        )


@lru_cache(maxsize=2)
def _epoch(epoch: int, size: int, seed: int) -> NDArray[np.intp]:
    # raw bits of a counter-based generator (Salmon et al. 2011), sorted: numpy keeps its bit streams fixed for ever,
    # which it does not promise for `permutation`
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")
