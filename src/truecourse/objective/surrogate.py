"""Policy-gradient surrogates over packed tokens, and the weights that add them up.

A loss is `(values_T * weights_T).sum()` with the weights of the whole batch, so its gradient does not depend on how the
batch is cut into micro-batches of whole sequences. SFT is the same with values −logp; an entropy bonus is −coefficient
times the entropies that the log-prob path returns, added to the values (TRL averages its bonus over tokens whatever the
loss: weights by `token`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Lengths = Sequence[int] | Tensor
"""Tokens in each of N sequences, each at least 1; they lie end to end in a `_T` tensor."""


# -- sequences in packed tokens ---------------------------------------------------------------------------------------


def spread(values_N: Tensor, lengths_N: Lengths) -> Tensor:
    """Each sequence's value at each of its tokens: `[N]` to `[T]`."""
    return values_N.repeat_interleave(_counts(lengths_N, values_N.device))


def segment_sum(values_T: Tensor, lengths_N: Lengths) -> Tensor:
    """Sum over each sequence's tokens: `[T]` to `[N]`."""
    counts_N = _counts(lengths_N, values_T.device)
    # a fixed order of summation, unlike index_add's on a GPU; unsafe leaves out a check that would wait for the GPU
    return torch.segment_reduce(values_T, "sum", lengths=counts_N, unsafe=values_T.is_cuda)


def segment_mean(values_T: Tensor, lengths_N: Lengths) -> Tensor:
    """Mean over each sequence's tokens: `[T]` to `[N]`."""
    return segment_sum(values_T, lengths_N) / _counts(lengths_N, values_T.device)


def token_weights(
    lengths_N: Lengths,
    how: Literal["token", "sequence", "constant"],
    max_tokens: int | None = None,
    valid_N: Tensor | Sequence[bool] | None = None,
) -> Tensor:
    """Weight `[T]`, float32, of each token in the loss of the whole batch of N sequences.

    | how | weight of a token of a valid sequence | loss it makes | TRL's `loss_type` |
    |---|---|---|---|
    | token | 1 / tokens of all valid sequences | mean over tokens (DAPO, arXiv:2503.14476, eq. 8) | dapo, cispo, bnpo |
    | sequence | 1 / (valid sequences × its length) | mean over sequences of token means (GRPO) | grpo |
    | constant | 1 / (N × max_tokens) | sum over a constant (Dr. GRPO, arXiv:2503.20783, §3.2) | dr_grpo |

    Tokens of sequences that are not valid weigh 0. `token` and `sequence` stay means over what is valid; `constant`
    keeps its constant, so N counts all. With `mask_truncated_completions` TRL has the same for dapo and dr_grpo, while
    its grpo divides by all sequences: by valid / N less. Without any valid sequence all weights are 0.
    """
    counts_N = _counts(lengths_N, None)
    valid_N = torch.ones_like(counts_N) if valid_N is None else torch.as_tensor(valid_N, device=counts_N.device).long()
    match how:
        case "token":
            weight_N = valid_N / (counts_N * valid_N).sum().clamp(min=1)
        case "sequence":
            weight_N = valid_N / (counts_N * valid_N.sum().clamp(min=1))
        case "constant":
            assert max_tokens is not None, "constant weights need max_tokens"
            weight_N = valid_N / (len(counts_N) * max_tokens)
        case _:
            raise ValueError(f"aggregation {how!r} is not one of token, sequence, constant")
    return spread(weight_N.float(), counts_N)


def _counts(lengths_N: Lengths, device: torch.device | None) -> Tensor:
    return torch.as_tensor(lengths_N, dtype=torch.long, device=device)


# -- surrogates -------------------------------------------------------------------------------------------------------


def importance_ratio(
    logp_T: Tensor, old_logp_T: Tensor, lengths_N: Lengths, level: Literal["token", "sequence"]
) -> Tensor:
    """Policy over old policy `[T]`: of each token, or of its sequence as the geometric mean over its tokens.

    `sequence` is GSPO's s_i (Zheng et al. 2025, arXiv:2507.18071, eq. 7), the same at each token of the sequence, with
    the gradient through all of them, as TRL's `importance_sampling_level="sequence"`. With one advantage per sequence
    its gradient is also that of GSPO-token.
    """
    log_ratio_T = logp_T - old_logp_T
    if level == "token":
        return log_ratio_T.exp()
    if level == "sequence":
        return spread(segment_mean(log_ratio_T, lengths_N).exp(), lengths_N)
    raise ValueError(f"ratio level {level!r} is not one of token, sequence")


def surrogate(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantages_T: Tensor,
    lengths_N: Lengths,
    *,
    loss: Literal["clip", "cispo", "reinforce"],
    level: Literal["token", "sequence"],
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """(loss `[T]` to be minimised, whether the clip is active `[T]`), with r the `importance_ratio`, A the advantage.

    clip: −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A) (PPO; Schulman et al. 2017, arXiv:1707.06347, eq. 7; two
    bounds: DAPO, eq. 10). Active where it cuts the gradient: r above and A > 0, or r below and A < 0.
    cispo: −sg(clip(r, 1 − clip_low, 1 + clip_high))·A·logp (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5). Active where r
    is out of bounds, whatever A. The paper and TRL have no lower bound: clip_low ≥ 1; TRL's `epsilon_high` is the bound
    itself, 1 + clip_high here.
    reinforce: −A·logp, never active; the ratio plays no part.

    On policy, `old_logp_T = logp_T.detach()`: the ratio is exactly 1 and all three have one gradient.
    """
    if loss == "reinforce":
        return -advantages_T * logp_T, torch.zeros_like(logp_T, dtype=torch.bool)
    ratio_T = importance_ratio(logp_T, old_logp_T, lengths_N, level)
    above_T, below_T = ratio_T > 1 + clip_high, ratio_T < 1 - clip_low
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    if loss == "clip":
        clipped_T = (above_T & (advantages_T > 0)) | (below_T & (advantages_T < 0))
        return -torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T), clipped_T
    if loss == "cispo":
        return -bounded_T.detach() * advantages_T * logp_T, above_T | below_T
    raise ValueError(f"loss {loss!r} is not one of clip, cispo, reinforce")


# -- another sampler --------------------------------------------------------------------------------------------------


def truncated_importance_weights(logp_T: Tensor, sampler_logp_T: Tensor, cap: float) -> Tensor:
    """min(policy / sampler, cap) per token, detached: factors on the loss where another engine sampled.

    `logp_T` are the trainer's log-probs with the weights that sampled (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"; the bound is Ionides 2008's truncated importance sampling).
    """
    return (logp_T.detach() - sampler_logp_T).clamp(max=math.log(cap)).exp()


def effective_sample_size(log_weights: Tensor) -> float:
    """(Σw)² / (n Σw²), in (0, 1]: the share of n samples (tokens or sequences) that weighted ones are worth (Kish)."""
    assert log_weights.numel(), "no weights"
    log_w = log_weights.detach().double().flatten()
    share = 2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0) - math.log(log_w.numel())
    return min(1.0, math.exp(share.item()))


# -- shaping ----------------------------------------------------------------------------------------------------------


def overlong_penalty(length_N: Lengths, max_tokens: int, soft: int) -> Tensor:
    """Soft punishment for length (DAPO, arXiv:2503.14476, eq. 13), float32 `[N]`, to be added to the rewards.

    0 up to max_tokens − soft, then falling linearly to −1 at max_tokens and beyond; soft = 0 is off.
    """
    lengths_N = torch.as_tensor(length_N, dtype=torch.float32)
    if not soft:
        return torch.zeros_like(lengths_N)
    return ((max_tokens - soft - lengths_N) / soft).clamp(-1.0, 0.0)
