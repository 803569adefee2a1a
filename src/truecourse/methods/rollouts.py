"""What methods that sample share: groups of scored completions, their metrics, and how an unspent rollout is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truecourse.data.sequences import Batch, Completion, Prompt
from truecourse.rewards import Scores
from truecourse.run.samples import real, sample_rows


@dataclass(frozen=True)
class Group:
    """A prompt, its completions that have a reward, and their advantages."""

    prompt: Prompt
    completions: list[Completion]
    advantages: list[float]


@dataclass(frozen=True)
class Round:
    """One call of the engine: its completions with scores and advantages."""

    prompts: list[Prompt]
    completions: list[list[Completion]]
    scores: Scores
    advantages_PG: Tensor
    penalties_PG: Tensor
    """What length added to the reward; at most 0."""
    valid_PG: Tensor
    """Whether the reward is there."""
    high_P: Tensor
    """Groups whose rewards agree, at the high end of the round."""
    low_P: Tensor
    """Groups whose rewards agree, at the low end."""

    def groups(self, only_alive: bool) -> list[Group]:
        """Groups of the completions that have a reward; with `only_alive`, without those whose rewards all agree."""
        found = []
        for p, prompt in enumerate(self.prompts):
            if only_alive and bool(self.high_P[p] | self.low_P[p]):
                continue
            keep = [g for g in range(len(self.completions[p])) if self.valid_PG[p, g]]
            if keep:
                chosen = [self.completions[p][g] for g in keep]
                found.append(Group(prompt, chosen, [float(self.advantages_PG[p, g]) for g in keep]))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The records of its completions, with their advantages."""
        advantages_N = self.advantages_PG.reshape(-1).tolist()
        rows = sample_rows(self.prompts, self.completions, self.scores)
        return [row | {"advantage": a} for row, a in zip(rows, advantages_N, strict=True)]


def batch_of(groups: Sequence[Group]) -> tuple[Batch, Tensor, Tensor, int]:
    """The ragged batch of these groups, advantages `[N]`, the sampler's log-probs `[T]`, the version sampled from."""
    completions = [c for group in groups for c in group.completions]
    owner = [i for i, group in enumerate(groups) for _ in group.completions]
    batch = Batch([g.prompt.tokens for g in groups], [c.tokens for c in completions], owner)
    advantages_N = torch.tensor([a for group in groups for a in group.advantages])
    return batch, advantages_N, torch.tensor([p for c in completions for p in c.logps]), completions[0].version


def rollout_metrics(rounds: Sequence[Round]) -> dict[str, float]:
    """Metrics of what was sampled and scored (docs/metrics.md)."""
    completions = [c for r in rounds for group in r.completions for c in group]
    groups = [group for r in rounds for group in r.completions]
    rewards = _scored(r.scores.values_PG for r in rounds)
    metrics: dict[str, float] = {"reward/failed": sum(len(r.scores.failures) for r in rounds)}
    if rewards:
        mean = _mean(rewards)
        metrics["reward/mean"] = mean
        metrics["reward/std"] = (sum((v - mean) ** 2 for v in rewards) / max(1, len(rewards) - 1)) ** 0.5
    for name in dict.fromkeys(name for r in rounds for name in r.scores.parts):
        scored = _scored(r.scores.parts.get(name, []) for r in rounds)
        if scored:
            metrics[f"reward/{name}"] = _mean(scored)
    for name in dict.fromkeys(name for r in rounds for name in r.scores.notes):
        metrics[f"reward/{name}"] = _mean([r.scores.notes[name] for r in rounds if name in r.scores.notes])
    lengths = [len(c.tokens) for c in completions]
    return metrics | {
        "groups/zero_std_high": float(torch.cat([r.high_P for r in rounds]).float().mean()),
        "groups/zero_std_low": float(torch.cat([r.low_P for r in rounds]).float().mean()),
        "length/mean": _mean(lengths),
        "length/max": max(lengths),
        "length/truncated": _mean([c.stop == "length" for c in completions]),
        "diversity": _mean([len({c.tokens for c in group}) / len(group) for group in groups]),
        "tokens/prompt": sum(len(p.tokens) for r in rounds for p in r.prompts),
        "tokens/completion": sum(lengths),
    }


def dump(shares: Sequence[Sequence[Group]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """An unspent rollout as plain JSON values; `parse` gives it back exactly."""
    place = {prompt.index: i for i, prompt in enumerate(prompts)}
    unique = {id(group): group for share in shares for group in share}
    number = {key: i for i, key in enumerate(unique)}
    return {
        "groups": [
            {
                "prompt": place[group.prompt.index],
                "completions": [
                    dataclasses.asdict(c) | {"tokens": list(c.tokens), "logps": list(c.logps)}
                    for c in group.completions
                ],
                "advantages": group.advantages,
            }
            for group in unique.values()
        ],
        "shares": [[number[id(group)] for group in share] for share in shares],
    }


def parse(rollout: dict[str, Any], prompts: Sequence[Prompt]) -> list[list[Group]]:
    """The inverse of `dump`."""
    groups = [
        Group(
            prompts[row["prompt"]],
            [Completion(**c | {"tokens": tuple(c["tokens"]), "logps": tuple(c["logps"])}) for c in row["completions"]],
            row["advantages"],
        )
        for row in rollout["groups"]
    ]
    return [[groups[i] for i in share] for share in rollout["shares"]]


def _scored(tables: Iterable[Sequence[Sequence[float | None]]]) -> list[float]:
    """The scores that are there: neither failed (NaN) nor not applicable (None)."""
    return [float(v) for table in tables for row in table for v in row if v is not None and real(v) is not None]


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))
