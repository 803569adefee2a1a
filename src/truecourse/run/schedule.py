"""The learning rate at each step."""

from __future__ import annotations

import math
from typing import Literal

FLOOR = 0.1
"""Share of the peak at which cosine and linear end."""


def learning_rate(
    step: int, total: int, peak: float, warmup_share: float, schedule: Literal["cosine", "linear", "constant"]
) -> float:
    """Learning rate of optimiser step `step`, 1..`total`.

    It rises linearly to `peak` over the first w = ceil(warmup_share · total) steps, step s having peak · s / w (never
    0: no step is wasted), then falls to `FLOOR` · peak at the last step by half a cosine (Loshchilov & Hutter 2017,
    eq. 5) or a line, or stays. These are the values that transformers' `get_cosine_with_min_lr_schedule_with_warmup`
    and `get_constant_schedule_with_warmup` have after `step` calls of `step()`.
    """
    assert 1 <= step <= total, f"step {step} of {total}"
    warmup = math.ceil(warmup_share * total - 1e-9)  # 0.07 · 100 is 7.000000000000001
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        fall = 1 - progress
    elif schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise AssertionError(f"schedule {schedule!r}")
    return peak * (FLOOR + (1 - FLOOR) * fall)
