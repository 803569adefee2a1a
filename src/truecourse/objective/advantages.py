"""Rewards of groups to advantages, and which groups have nothing to teach."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SAME = 1e-6
"""Rewards agree when they differ by at most this share of the largest: the noise of float32 sums."""


def group_advantages(
    rewards_PG: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out", "none"],
    scale: Literal["sample", "population", "batch", "none"],
    epsilon: float = 1e-4,
    valid_PG: Tensor | None = None,
) -> Tensor:
    """Advantages `[P, G]` in float32 of rewards `[P, G]`: (reward − baseline) / (scale + epsilon).

    baseline: the mean of the group (GRPO; Shao et al. 2024, arXiv:2402.03300, §4.1.2), the mean of the group's others
    (RLOO; Ahmadian et al. 2024, arXiv:2402.14740: unbiased where nothing is divided), or nothing.
    scale: the std of the group's rewards with n − 1 (`sample`: TRL, veRL, OpenRLHF) or n (`population`); the sample
    std of the rewards of the whole batch (`batch`: TRL's `scale_rewards="batch"`); or nothing (Dr. GRPO; Liu et al.
    2025, arXiv:2503.20783). `none` with `batch` is REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): the batch's mean is
    subtracted too. (Its variant "with baseline" divides by the std of the centred rewards: another constant.)
    epsilon: 1e-4 as in TRL.

    A group whose valid rewards agree (`SAME`), or with fewer than two of them, gets exactly 0, unless groups play no
    part (baseline `none` with scale `batch` or `none`). Entries not in `valid_PG` (by default those that are NaN) are
    left out of every mean and std and get exactly 0.
    """
    valid_PG, rewards_PG = _valid(rewards_PG, valid_PG)
    count_P1 = valid_PG.sum(1, keepdim=True)
    mean_P1 = rewards_PG.sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = torch.where(valid_PG, rewards_PG - mean_P1, 0.0)
    live_P1 = ~_same(rewards_PG, valid_PG, dim=1) & (count_P1 >= 2)

    match baseline:
        case "mean":
            values_PG = centred_PG
        case "leave_one_out":  # r − (Σr − r) / (n − 1)
            values_PG = centred_PG * (count_P1 / (count_P1 - 1).clamp(min=1))
        case "none":
            values_PG = rewards_PG
        case _:
            raise ValueError(f"baseline {baseline!r} is not one of mean, leave_one_out, none")

    match scale:
        case "sample" | "population":
            freedom_P1 = (count_P1 - int(scale == "sample")).clamp(min=1)
            values_PG = values_PG / ((centred_PG.square().sum(1, keepdim=True) / freedom_P1).sqrt() + epsilon)
        case "batch":
            count = valid_PG.sum()
            mean = rewards_PG.sum() / count.clamp(min=1)
            deviation_PG = torch.where(valid_PG, rewards_PG - mean, 0.0)
            if baseline == "none":
                same = _same(rewards_PG.view(1, -1), valid_PG.view(1, -1), dim=1)
                values_PG = torch.where(same, 0.0, deviation_PG)
            values_PG = values_PG / ((deviation_PG.square().sum() / (count - 1).clamp(min=1)).sqrt() + epsilon)
        case "none":
            pass
        case _:
            raise ValueError(f"scale {scale!r} is not one of sample, population, batch, none")

    if baseline != "none" or scale in ("sample", "population"):
        values_PG = torch.where(live_P1, values_PG, 0.0)
    return torch.where(valid_PG, values_PG, 0.0).float()


def dead_groups(
    rewards_PG: Tensor, valid_PG: Tensor | None = None, *, high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Which groups `[P]` have rewards that all agree: (at the high end, at the low end), two bool tensors.

    A dead group teaches nothing: its completions all succeed, or all fail. It is high when its mean is at least
    `high`; left out, `high` is the middle between the smallest and the largest valid reward of the batch, and
    where the whole batch agrees a group is high when its reward is above 0. A group with fewer than two valid rewards
    is neither: what ails it is failed rewards.
    """
    valid_PG, rewards_PG = _valid(rewards_PG, valid_PG)
    dead_P = _same(rewards_PG, valid_PG, dim=1)[:, 0] & (valid_PG.sum(1) >= 2)
    mean_P = rewards_PG.sum(1) / valid_PG.sum(1).clamp(min=1)
    if high is not None:
        high_P = mean_P >= high - SAME * abs(high)
    else:
        least, most = _range(rewards_PG.view(1, -1), valid_PG.view(1, -1), dim=1)
        same = _same(rewards_PG.view(1, -1), valid_PG.view(1, -1), dim=1)
        high_P = torch.where(same, mean_P > 0, mean_P >= (least + most) / 2)[0]
    return dead_P & high_P, dead_P & ~high_P


def _valid(rewards_PG: Tensor, valid_PG: Tensor | None) -> tuple[Tensor, Tensor]:
    """The valid entries, and the rewards in float64 with zeros in place of the others."""
    assert rewards_PG.dim() == 2
    valid_PG = ~rewards_PG.isnan() if valid_PG is None else valid_PG.bool()
    rewards_PG = torch.where(valid_PG, rewards_PG.double(), 0.0)
    assert rewards_PG.isfinite().all(), "a reward marked as valid is not finite"
    return valid_PG, rewards_PG


def _range(values: Tensor, valid: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    least = torch.where(valid, values, torch.inf).amin(dim, keepdim=True)
    most = torch.where(valid, values, -torch.inf).amax(dim, keepdim=True)
    return least, most


def _same(values: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Whether the valid values agree along `dim`, which is kept; true where there is none."""
    least, most = _range(values, valid, dim)
    return most - least <= SAME * torch.maximum(most.abs(), least.abs())
