"""DPO: fit the optimum of J to comparisons, with no reward model between.

    J(π) = E_{x, y~π}[ r(x, y) ] − β · KL(π ‖ π_ref)          its optimum: π* ∝ π_ref · exp(r / β)

At the optimum r = β · (log π* − log π_ref) + a constant of the prompt (Rafailov et al. 2023, eq. 5). The constant falls
out of a comparison, so the Bradley–Terry loss on r_chosen − r_rejected, which fits a reward model, fits the policy
itself with that *implicit* reward in r's place. Nothing is sampled. Variants change what is taken of the margin
(objective/preference.py), how an answer's log-prob is counted, and whether there is a reference.

Departures from the paper and from common trainers:
  - chosen and rejected share their prompt's forward; a pair is never cut apart by micro-batches;
  - a pair that does not fit is refused or skipped by its row, never cut: a cut answer has lost its end;
  - accuracy counts a tie as one half, so that a policy that is its own reference has 0.5, not 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from truecourse.data.order import fingerprint, refuse_other_data, take
from truecourse.data.pairs import TokenPair
from truecourse.data.sequences import Batch
from truecourse.errors import UserError
from truecourse.model.policy import Policy
from truecourse.objective.preference import PairLoss, implicit_rewards, pair_loss
from truecourse.objective.surrogate import segment_sum
from truecourse.recipe import Dpo
from truecourse.run.loop import StepResult

ROLES = ("policy", "reference")
"""Models held in memory while it trains; a stored reference, or none, needs only the policy."""


class DPO:
    """One `step` is one optimiser update on `batch_size` pairs. N counts pairs; 2N their answers, chosen first.

    The policy still has the reference's weights when it is handed in: log-probs that are stored are its own.
    """

    def __init__(
        self, config: Dpo, policy: Policy, pairs: list[TokenPair], held_out: list[TokenPair], seed: int
    ) -> None:
        self.config, self.values, self.policy, self.seed = config, _values(config), policy, seed
        self.pairs, self.held_out = pairs, held_out
        self.cursor = 0
        self.stored: dict[str, list[float]] = {}  # log-probs of answers under the reference, 2 for each pair

    def step(self, step: int, lr: float, phase: Callable[[str], None]) -> StepResult:
        config, policy, started = self.config, self.policy, time.perf_counter()
        rows = take(self.cursor, config.batch_size, len(self.pairs), self.seed)
        self.cursor += config.batch_size
        batch = _batch([self.pairs[i] for i in rows])
        phase("scoring under the reference")
        ref_logp_2N = self._reference(batch, "train", rows)
        logps, losses, entropy = [], [], 0.0
        parts = policy.micro_batches(batch, unit=2)
        for i, part in enumerate(parts):
            phase(f"training, micro-batch {i + 1} of {len(parts)}")
            logp_T, entropy_T = policy.logprobs(part.batch)
            logp_2N = segment_sum(logp_T, part.batch.lengths_N)
            loss_N = self._losses(logp_2N, None if ref_logp_2N is None else ref_logp_2N[part.rows], part.batch)[0]
            policy.backward(loss_N.sum() / len(rows))
            logps.append(logp_2N.detach())
            losses.append(loss_N.detach())
            entropy += float(entropy_T.detach().sum())
        grad_norm = policy.step(lr)
        logp_2N = torch.cat(logps)
        rewards_2N = self._losses(logp_2N, ref_logp_2N, batch)[1]
        return StepResult(
            _measures(torch.cat(losses), logp_2N, rewards_2N)
            | {
                "entropy": entropy / sum(batch.lengths_N),
                "grad_norm": grad_norm,
                "epoch": self.cursor / len(self.pairs),
                "tokens/prompt": sum(len(p) for p in batch.prompts),
                "tokens/completion": sum(batch.lengths_N),
                "time/train": time.perf_counter() - started,
            }
        )

    def evaluate(self) -> dict[str, float]:
        """The step's measures on the held-out pairs."""
        if not self.held_out:
            return {}
        batch = _batch(self.held_out)
        ref_logp_2N = self._reference(batch, "held_out", range(len(self.held_out)))
        logp_2N = self._score(batch)
        loss_N, rewards_2N = self._losses(logp_2N, ref_logp_2N, batch)
        return {f"{name}/held_out": value for name, value in _measures(loss_N, logp_2N, rewards_2N).items()}

    def _losses(self, logp_2N: Tensor, ref_logp_2N: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss `[N]` of each pair, and implicit reward `[2N]` of each answer."""
        values = self.values
        rewards_2N = implicit_rewards(logp_2N, ref_logp_2N, batch.lengths_N, values.beta, values.length)
        loss_N = pair_loss(
            rewards_2N[::2] - rewards_2N[1::2], loss=values.loss, beta=values.beta, robust=values.robust,
            target_margin=values.target_margin, label_smoothing=values.label_smoothing,
        )  # fmt: skip
        return loss_N, rewards_2N

    # -- the reference

    def _reference(self, batch: Batch, side: Literal["train", "held_out"], rows: Sequence[int]) -> Tensor | None:
        """Log-probs `[2N]` of these pairs' answers under the reference; None where there is none."""
        if self.values.reference == "stored":
            if not self.stored:
                sides = {"train": self.pairs, "held_out": self.held_out}
                self.stored = {name: self._score(_batch(pairs)).tolist() for name, pairs in sides.items() if pairs}
            logps = self.stored[side]
            return torch.tensor([logps[2 * i + j] for i in rows for j in (0, 1)], device=self.policy.device)
        if self.values.reference == "none":
            return None
        return segment_sum(self.policy.reference(batch), batch.lengths_N)

    def _score(self, batch: Batch) -> Tensor:
        """Log-probs `[2N]` of whole answers under the policy as it is now."""
        return segment_sum(self.policy.score(batch), batch.lengths_N)

    # -- resume

    def state(self) -> dict[str, Any]:
        return {"data": self._data(), "cursor": self.cursor, "stored": self.stored}

    def load_state(self, state: dict[str, Any]) -> None:
        refuse_other_data(state["data"], self._data())
        self.cursor, self.stored = state["cursor"], state["stored"]

    def _data(self) -> str:
        return fingerprint(tokens for pair in (*self.pairs, *self.held_out) for tokens in pair)


def _batch(pairs: list[TokenPair]) -> Batch:
    answers = [answer for _, chosen, rejected in pairs for answer in (chosen, rejected)]
    return Batch([pair.prompt for pair in pairs], answers, [i for i in range(len(pairs)) for _ in range(2)])


def _measures(loss_N: Tensor, logp_2N: Tensor, rewards_2N: Tensor) -> dict[str, float]:
    margin_N = rewards_2N[::2] - rewards_2N[1::2]
    return {
        "loss": float(loss_N.mean()),
        "pairs/accuracy": float(((margin_N.sign().double() + 1) / 2).mean()),
        "reward/chosen": float(rewards_2N[::2].mean()),
        "reward/rejected": float(rewards_2N[1::2].mean()),
        "reward/margin": float(margin_N.mean()),
        "logp/chosen": float(logp_2N[::2].mean()),
        "logp/rejected": float(logp_2N[1::2].mean()),
    }


# -- variants: rows of values -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What sets one variant apart from another: DPO's values (Rafailov et al. 2023). The fields are explained where the
    recipe has them (`truecourse.recipe.Dpo`)."""

    beta: float = 0.1
    loss: PairLoss = "sigmoid"
    length: Literal["sum", "mean"] = "sum"
    target_margin: float = 0.0
    label_smoothing: float = 0.0
    robust: bool = False
    reference: Literal["auto", "copy", "adapter_off", "offload", "stored", "none"] = "auto"


VARIANTS: dict[str, Variant] = {
    "dpo": Variant(),
    # Mitchell 2023 (A note on DPO with noisy preferences): choices are flipped with this probability
    "cdpo": Variant(label_smoothing=0.1),
    # Chowdhury et al. 2024 (Provably robust DPO): the same belief, the loss unbiased under it
    "robust": Variant(label_smoothing=0.1, robust=True),
    # Azar et al. 2023 (IPO): a square with its optimum at a finite margin; per token, as its authors ran it
    "ipo": Variant(loss="square", length="mean"),
    # Zhao et al. 2023 (SLiC-HF), with the reference as Liu et al. 2023 (RSO) have it
    "hinge": Variant(loss="hinge"),
    # Lambert et al. 2024 (Tülu 3): length-normalised DPO
    "dpo_norm": Variant(length="mean", beta=5.0),
    # Meng et al. 2024 (SimPO): length-normalised, no reference, a target margin
    "simpo": Variant(length="mean", beta=2.0, target_margin=1.0, reference="none"),
}


def resolve(config: Dpo) -> Dpo:
    """`config` with every setting that was left out filled in from its variant's row.

    Raises `UserError` where the settings contradict each other.
    """
    row = dataclasses.asdict(VARIANTS[config.variant])
    full = dataclasses.replace(config, **{k: v for k, v in row.items() if getattr(config, k) is None})
    if full.loss != "sigmoid" and full.label_smoothing:
        raise UserError(f'label_smoothing belongs to loss = "sigmoid", which is a likelihood; loss is "{full.loss}"')
    if full.loss == "square" and full.target_margin:
        raise UserError('loss = "square" has the target 1 / (2 · beta) by itself; leave target_margin out')
    if full.robust and not full.label_smoothing:
        raise UserError("robust = true needs label_smoothing, the share of choices believed to be flipped")
    return full


def _values(config: Dpo) -> Variant:
    """The resolved values of `config`, none of them missing."""
    full = resolve(config)
    return Variant(**{f.name: getattr(full, f.name) for f in dataclasses.fields(Variant)})
