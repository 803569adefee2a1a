"""Losses on comparisons: Bradley–Terry, and the family that puts an implicit reward into it.

A comparison is a margin, the reward of the chosen answer less that of the rejected one; N counts comparisons here, and
2N their answers, chosen and rejected in turn. All losses are per comparison; a constant added to every reward changes
none of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from truecourse.objective.surrogate import Lengths

PairLoss = Literal["sigmoid", "square", "hinge"]


def bradley_terry(margin_N: Tensor, label_smoothing: float = 0.0, robust: bool = False) -> Tensor:
    """Negative log-likelihood `[N]` (nats) of the choices, where P(chosen ≻ rejected) = σ(margin).

    Bradley and Terry 1952; for reward models Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; a margin of the data's own
    (Touvron et al. 2023, Llama 2, eq. 2) is subtracted by the caller.

    label_smoothing: ε in [0, 0.5), the share of choices believed to be flipped.
        Not robust: −(1 − ε) log σ(m) − ε log σ(−m), the conservative loss (Mitchell 2023, cDPO), least at a finite
        margin, log((1 − ε) / ε).
        robust: [−(1 − ε) log σ(m) + ε log σ(−m)] / (1 − 2ε), whose mean over flips of rate ε is the loss without flips
        (Chowdhury et al. 2024, Provably robust DPO, arXiv:2403.00409). It falls without bound
        as a margin grows.
    """
    assert 0 <= label_smoothing < 0.5
    kept_N, flipped_N = -logsigmoid(margin_N), -logsigmoid(-margin_N)
    if not label_smoothing:
        return kept_N
    if robust:
        return ((1 - label_smoothing) * kept_N - label_smoothing * flipped_N) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * kept_N + label_smoothing * flipped_N


def implicit_rewards(
    logp_2N: Tensor, ref_logp_2N: Tensor | None, lengths_2N: Lengths, beta: float, length: Literal["sum", "mean"]
) -> Tensor:
    """The reward `[2N]` whose optimum of J the policy is: β · (log π − log π_ref), up to a constant of each prompt
    (Rafailov et al. 2023, DPO, arXiv:2305.18290, eq. 5).

    logp_2N, ref_logp_2N: log-probs (nats) of whole answers. Without a reference it is β · log π (SimPO).
    length: `mean` divides by the answer's tokens (SimPO; Lambert et al. 2024, Tülu 3, arXiv:2411.15124).
    """
    score_2N = logp_2N if ref_logp_2N is None else logp_2N - ref_logp_2N
    if length == "mean":
        score_2N = score_2N / torch.as_tensor(lengths_2N, device=score_2N.device)
    return beta * score_2N


def pair_loss(
    margin_N: Tensor,
    *,
    loss: PairLoss,
    beta: float,
    target_margin: float = 0.0,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    """Loss `[N]` of the margins β · (score of chosen − score of rejected).

    | loss | value at margin m | source |
    |---|---|---|
    | sigmoid | `bradley_terry(m − target_margin)` | DPO, eq. 7; SimPO (Meng et al. 2024, arXiv:2405.14734) |
    | square | ((m − 1/2) / β)² = (score difference − 1 / 2β)² | IPO (Azar et al. 2023, arXiv:2310.12036), eq. 17 |
    | hinge | max(0, 1 − m + target_margin) | SLiC-HF (arXiv:2305.10425) in the form of RSO (arXiv:2309.06657) |
    """
    if loss == "sigmoid":
        return bradley_terry(margin_N - target_margin, label_smoothing, robust)
    assert not label_smoothing, "only Bradley–Terry is a likelihood, which smoothed labels need"
    if loss == "hinge":
        return torch.relu(1 - margin_N + target_margin)
    assert not target_margin, "the square's target is 1 / 2β"
    return ((margin_N - 0.5) / beta) ** 2
