"""Estimators of KL(policy ‖ reference) from samples of the policy."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def kl_values(logp_T: Tensor, ref_logp_T: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-sample estimates of KL(policy ‖ reference), in nats, in the shape given.

    With d = logp − ref (Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html):

    | kind | value | as an estimate, samples from the policy | expected gradient as a loss, on policy |
    |---|---|---|---|
    | k1 | d | unbiased, can be negative | zero |
    | k2 | d² / 2 | biased, close where the two are | KL(policy ‖ reference), exact |
    | k3 | exp(−d) − 1 + d | unbiased, never negative | KL(reference ‖ policy): the forward KL |

    The gradients: Liu et al. 2025, "Rethinking KL Regularization in RLHF" (arXiv:2510.01555): a value's estimator is
    differentiated with the samples held fixed, so an unbiased value need not have an unbiased gradient.

    *Per what.* "Exact" is meant for the distribution that a sample is drawn from. Given token log-probs, k2 is the
    exact gradient of each token's KL at the prefixes that were visited, summed; it leaves out that a token also changes
    which prefixes come next. Given log-probs summed over each sequence (`segment_sum`), it is the exact gradient of the
    sequence KL, with the variance of a whole sequence's log-ratio. So with k3 and the forward KL.

    *Off policy* (samples of older weights) multiply by `importance_ratio`: detached, k2 stays the token KL's exact
    gradient; differentiated, so does k3, because then the whole is the value under the policy (DeepSeek-V3.2,
    arXiv:2512.02556; TRL's `use_bias_correction_kl`).
    """
    diff_T = logp_T - ref_logp_T
    match kind:
        case "k1":
            return diff_T
        case "k2":
            return 0.5 * diff_T.square()
        case "k3":
            return (-diff_T).expm1() + diff_T
    raise ValueError(f"kl estimator {kind!r} is not one of k1, k2, k3")
