"""Random streams of requests: counter-based, so that one does not depend on any other."""

from __future__ import annotations

import hashlib

import numpy as np

LARGEST = np.float32(1 - 2**-23)
"""No uniform is above this, so that in float32 `u * total < total` for every total: see `sampler.draw`."""


def uniforms(seed: tuple[int, ...], prompt: int, sample: int, count: int) -> np.ndarray:
    """`count` float32 uniforms in [0, 1), one for each token of a completion; a longer stream begins with the shorter.

    Philox (Salmon et al. 2011) keyed by a hash of the seed, the prompt's index and the sample's index.
    """
    name = repr((*map(int, seed), int(prompt), int(sample))).encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    raw = np.random.Philox(key=key).random_raw(count)
    return np.minimum((raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24), LARGEST)
