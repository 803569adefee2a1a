"""GRPO: climb J with the group's own statistics as the baseline.

    J(π) = E_{x, y~π}[ r(x, y) ] − β · KL(π ‖ π_ref)

The policy gradient of J is E[ A · ∇log π(y|x) ] for any advantage A = r − b(x). GRPO (Shao et al. 2024, DeepSeekMath,
eq. 3) samples G completions of each prompt and takes b and the scale of A from the group itself: no value model.
Each rollout is spent in one or more updates of PPO's clipped surrogate; the KL term acts as a loss or inside r.

Departures from the paper, each a setting (the papers' forms are `kl_loss = "k3"`, `aggregate = "sequence"`):
  - the KL loss is k2, per token: on policy its gradient is that of KL(π ‖ π_ref) at each visited prefix (k3's is the
    forward KL's). Neither sees that a token changes which prefixes come next; `kl_in = "reward"` does, with more noise;
  - the loss is the mean over the tokens of the whole batch (DAPO, §3.3), not over sequences of their own means;
  - the first update after a rollout takes its own log-probs as the old ones: the ratio is 1 by construction;
  - a completion whose reward failed leaves its group and the loss; it is never scored as 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from truecourse.data.order import fingerprint, refuse_other_data, take
from truecourse.data.sequences import Batch, Completion, Prompt
from truecourse.errors import UserError
from truecourse.methods.rollouts import Group, Round, batch_of, dump, parse, rollout_metrics
from truecourse.model.policy import Policy
from truecourse.objective.advantages import dead_groups, group_advantages
from truecourse.objective.kl import kl_values
from truecourse.objective.surrogate import (
    effective_sample_size,
    importance_ratio,
    overlong_penalty,
    segment_sum,
    spread,
    surrogate,
    token_weights,
    truncated_importance_weights,
)
from truecourse.recipe import Grpo
from truecourse.rewards import Reward, Scores, check_failures
from truecourse.rollout.engine import Engine
from truecourse.run.loop import StepResult

ROLES = ("policy", "reference", "reward")
"""Models held in memory while it trains."""


class GRPO:
    """One `step` is one optimiser update; a rollout is collected whenever the last one is spent."""

    def __init__(
        self, config: Grpo, policy: Policy, engine: Engine, reward: Reward, prompts: list[Prompt], seed: int
    ) -> None:
        self.config, self.values = config, _values(config)
        self.policy, self.engine, self.reward, self.prompts, self.seed = policy, engine, reward, prompts, seed
        self.cursor = 0  # prompts drawn so far
        self.shares: list[list[Group]] = []  # what is left of the rollout, one list of groups for each update

    # -- an update

    def step(self, step: int, lr: float, phase: Callable[[str], None]) -> StepResult:
        config, values, policy = self.config, self.values, self.policy
        result = StepResult({})
        if not self.shares:
            self._collect(step, phase, result)
        groups, started = self.shares.pop(0), time.perf_counter()

        batch, advantages_N, sampler_logp_T, version = batch_of(groups)
        beta_loss = values.beta if values.kl_in == "loss" else 0.0
        temperature = config.sampling.temperature
        lengths_N = torch.tensor(batch.lengths_N)
        in_loss_N = [not (config.mask_truncated and c.stop == "length") for g in groups for c in g.completions]
        weight_T = token_weights(lengths_N, values.aggregate, config.sampling.max_tokens, torch.tensor(in_loss_N))
        weight_T = weight_T.to(policy.device)
        advantages_T = spread(advantages_N, lengths_N).to(policy.device)
        sampler_logp_T = sampler_logp_T.to(policy.device)
        fresh = version == policy.version
        measure_kl = bool(values.beta) or step % config.kl_every == 0
        ref_logp_T = policy.reference(batch, temperature) if measure_kl else None

        logps, entropies, clipped, loss = [], [], [], 0.0
        parts = policy.micro_batches(batch)
        for i, part in enumerate(parts):
            phase(f"training, micro-batch {i + 1} of {len(parts)}")
            at = part.tokens
            logp_T, entropy_T = policy.logprobs(part.batch, temperature)
            old_T = logp_T.detach() if fresh else sampler_logp_T[at]
            loss_T, clipped_T = surrogate(
                logp_T, old_T, advantages_T[at], lengths_N[part.rows],
                loss=values.loss, level=values.ratio, clip_low=values.clip_low, clip_high=values.clip_high,
            )  # fmt: skip
            if not self.engine.exact:
                loss_T = loss_T * truncated_importance_weights(old_T, sampler_logp_T[at], config.is_cap)
            if beta_loss:
                assert ref_logp_T is not None
                kl_T = kl_values(logp_T, ref_logp_T[at], values.kl_loss)
                if not fresh:  # the samples are an older policy's: weigh them, or the KL's gradient is biased
                    kl_T = kl_T * importance_ratio(logp_T.detach(), old_T, lengths_N[part.rows], "token")
                loss_T = loss_T + beta_loss * kl_T
            if config.entropy_bonus:
                loss_T = loss_T - config.entropy_bonus * entropy_T
            part_loss = (loss_T * weight_T[at]).sum()
            policy.backward(part_loss)
            loss += float(part_loss.detach())
            logps.append(logp_T.detach())
            entropies.append(entropy_T.detach())
            clipped.append(clipped_T)
        grad_norm = policy.step(lr)
        self.engine.update(policy.weights(), policy.version)
        if config.reference_every and step % config.reference_every == 0:
            policy.move_reference(config.reference_mix)

        logp_T = torch.cat(logps)
        result.record |= {
            "loss": loss,
            "entropy": float(torch.cat(entropies).mean()),
            "clip/fraction": float(torch.cat(clipped).float().mean()),
            "grad_norm": grad_norm,
            "time/train": time.perf_counter() - started,
        }
        if ref_logp_T is not None:
            result.record["kl/ref"] = float(segment_sum(kl_values(logp_T, ref_logp_T, "k3"), lengths_N).mean())
            result.record["kl/ref_k1"] = float(segment_sum(kl_values(logp_T, ref_logp_T, "k1"), lengths_N).mean())
        gap_T = kl_values(sampler_logp_T, logp_T, "k3")  # samples came from the sampler
        if fresh:
            result.record["kl/sampler"] = float(gap_T.mean())
            result.record["ess"] = effective_sample_size(logp_T - sampler_logp_T)
        else:
            result.record["kl/update"] = float(segment_sum(gap_T, lengths_N).mean())
        return result

    # -- a rollout

    def _collect(self, step: int, phase: Callable[[str], None], result: StepResult) -> None:
        """Sample, score, and turn rewards into advantages; with dynamic sampling, until enough groups are alive."""
        config, values = self.config, self.values
        kept: list[Group] = []
        rounds: list[Round] = []
        times = {"rollout": 0.0, "reward": 0.0}
        while True:
            indices = take(self.cursor, config.prompts_per_step, len(self.prompts), self.seed)
            self.cursor += config.prompts_per_step
            prompts = [self.prompts[i] for i in indices]
            phase("sampling")
            at = time.perf_counter()
            # the same prompt may come up twice in one step when rounds cross an epoch: the round keeps streams apart
            seed = (self.seed, step, len(rounds))
            completions = self.engine.generate(prompts, config.group_size, config.sampling, seed)
            times["rollout"] += time.perf_counter() - at
            phase("scoring")
            at = time.perf_counter()
            scores = self.reward.score(prompts, completions)
            times["reward"] += time.perf_counter() - at
            check_failures(scores, config.max_reward_failures)
            this = self._advantages(prompts, completions, scores)
            rounds.append(this)
            kept += this.groups(only_alive=values.dynamic_sampling)
            enough = len(kept) >= config.prompts_per_step
            if enough or not values.dynamic_sampling or len(rounds) > config.max_resamples:
                break
        kept = kept[: config.prompts_per_step] or rounds[0].groups(only_alive=False)
        if not kept:
            raise UserError(
                f"no completion sampled at step {step} has a reward: every part of the reward returned None, "
                "which means that it does not apply; return a number for at least some of them"
            )
        self.shares = [kept[i :: config.updates_per_rollout] for i in range(config.updates_per_rollout)]
        self.shares = [share for share in self.shares if share] * config.epochs
        result.record |= rollout_metrics(rounds) | {f"time/{k}": v for k, v in times.items()}
        if values.dynamic_sampling:
            result.record["groups/resampled"] = len(rounds) - 1
        if values.overlong_tokens:
            penalties = torch.cat([r.penalties_PG.reshape(-1) for r in rounds])
            result.record["reward/overlong_penalty"] = float(penalties.mean())
        result.rollouts = [row for r in rounds for row in r.rows()]

    def _advantages(self, prompts: list[Prompt], completions: list[list[Completion]], scores: Scores) -> Round:
        config, values = self.config, self.values
        rewards_PG = torch.tensor(scores.values_PG, dtype=torch.float64)
        lengths_PG = torch.tensor([[len(c.tokens) for c in group] for group in completions])
        penalties_PG = torch.zeros_like(rewards_PG)
        if values.overlong_tokens:
            penalties_PG = overlong_penalty(lengths_PG, config.sampling.max_tokens, values.overlong_tokens).double()
        shaped_PG = rewards_PG + penalties_PG
        if values.beta and values.kl_in == "reward":
            owners = [p for p, group in enumerate(completions) for _ in group]
            batch = Batch([p.tokens for p in prompts], [c.tokens for group in completions for c in group], owners)
            temperature = config.sampling.temperature
            now_T, ref_T = self.policy.score(batch, temperature), self.policy.reference(batch, temperature)
            kl_N = segment_sum(kl_values(now_T, ref_T, "k1"), lengths_PG.reshape(-1))
            shaped_PG = shaped_PG - values.beta * kl_N.reshape(shaped_PG.shape).to(shaped_PG)
        valid_PG = rewards_PG.isfinite()
        advantages_PG = group_advantages(shaped_PG, baseline=values.baseline, scale=values.scale, valid_PG=valid_PG)
        high_P, low_P = dead_groups(rewards_PG, valid_PG)
        return Round(prompts, completions, scores, advantages_PG, penalties_PG, valid_PG, high_P, low_P)

    # -- resume

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the policy: the cursor and the unspent rollout."""
        data = fingerprint(p.tokens for p in self.prompts)
        return {"data": data, "cursor": self.cursor, "rollout": dump(self.shares, self.prompts)}

    def load_state(self, state: dict[str, Any]) -> None:
        refuse_other_data(state["data"], fingerprint(p.tokens for p in self.prompts))
        self.cursor = state["cursor"]
        self.shares = parse(state["rollout"], self.prompts)
        self.engine.update(self.policy.weights(), self.policy.version)

    def evaluate(self) -> dict[str, float]:
        return {}


# -- variants: rows of values -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What sets one variant apart from another: GRPO's values (Shao et al. 2024) with the departures above. The fields
    are explained where the recipe has them (`truecourse.recipe.Grpo`)."""

    beta: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_loss: Literal["k1", "k2", "k3"] = "k2"
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["sample", "population", "batch", "none"] = "sample"
    ratio: Literal["token", "sequence"] = "token"
    loss: Literal["clip", "cispo", "reinforce"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Literal["token", "sequence", "constant"] = "token"
    dynamic_sampling: bool = False
    overlong_tokens: int | None = 0
    """None is a fifth of max_tokens."""


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(),
    # Liu et al. 2025 (Understanding R1-Zero-like training): no std, a constant normaliser; both biases removed
    "dr_grpo": Variant(scale="none", aggregate="constant"),
    # Yu et al. 2025 (DAPO): clip-higher, dynamic sampling, soft punishment of length
    "dapo": Variant(clip_high=0.28, dynamic_sampling=True, overlong_tokens=None),
    # Zheng et al. 2025 (GSPO), §5.1: sequence ratio, narrow clip range
    "gspo": Variant(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence"),
    # MiniMax 2025 (MiniMax-M1), eq. 4–5: the clipped weight is detached, so every token keeps its gradient
    "cispo": Variant(loss="cispo", clip_low=1.0, clip_high=4.0),
    # Ahmadian et al. 2024 (Back to basics): leave-one-out baseline, no scale, no clip, KL in the reward
    "rloo": Variant(
        baseline="leave_one_out", scale="none", loss="reinforce", aggregate="constant", kl_in="reward", beta=0.05
    ),
    # Hu et al. 2025 (REINFORCE++): no group baseline, advantages normalised over the whole batch, KL in the reward
    "reinforce++": Variant(baseline="none", scale="batch", kl_in="reward", beta=0.01),
}


def resolve(config: Grpo) -> Grpo:
    """`config` with every setting that was left out filled in from its variant's row.

    Raises `UserError` where a set value and the row contradict each other.
    """
    row = dataclasses.asdict(VARIANTS[config.variant])
    if row["overlong_tokens"] is None:
        row["overlong_tokens"] = config.sampling.max_tokens // 5
    full = dataclasses.replace(config, **{k: v for k, v in row.items() if getattr(config, k) is None})
    if full.baseline == "none" and full.scale in ("sample", "population"):
        raise UserError(
            f'baseline = "none" with scale = "{full.scale}" divides by a std that was not centred first; '
            'use scale = "batch" or "none"'
        )
    _refuse_unused(full, row)
    return full


def _refuse_unused(full: Grpo, row: dict[str, Any]) -> None:
    """Raise `UserError` for a setting of the user's own that plays no part beside the others."""
    unused = {
        "while beta = 0": () if full.beta else ("kl_in", "kl_loss"),
        'with kl_in = "reward"': ("kl_loss",) if full.kl_in == "reward" else (),
        'with loss = "reinforce"': ("clip_low", "clip_high", "ratio") if full.loss == "reinforce" else (),
        "without dynamic_sampling": () if full.dynamic_sampling else ("max_resamples",),
    }
    row = row | {"max_resamples": Grpo.max_resamples}
    for beside, names in unused.items():
        for name in names:
            value = getattr(full, name)
            if value != row[name]:
                shown = f'"{value}"' if isinstance(value, str) else value
                raise UserError(f"stage 'grpo': {name} = {shown} does nothing {beside}; leave it out, or change that")


def _values(config: Grpo) -> Variant:
    """The resolved values of `config`, none of them missing."""
    full = resolve(config)
    return Variant(**{f.name: getattr(full, f.name) for f in dataclasses.fields(Variant)})
