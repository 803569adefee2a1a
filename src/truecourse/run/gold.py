"""The gold: a second measure, on held-out prompts, that training never touches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from truecourse.data.sequences import Prompt
from truecourse.errors import UserError
from truecourse.model.policy import Policy
from truecourse.recipe import Sampling
from truecourse.rewards import Reward, check_failures
from truecourse.rollout.engine import Engine
from truecourse.run.samples import sample_rows


@dataclass(frozen=True)
class Measured:
    record: dict[str, Any]
    """`gold/<name>` with its 95 % interval, by part; count, lengths."""
    rows: list[dict[str, Any]]
    """Records of the completions behind it."""


@dataclass(frozen=True)
class Gold:
    """Scores one completion of each held-out prompt, always the same prompts with the same random streams."""

    name: str
    """The part that decides which checkpoint is best: the first one."""
    reward: Reward
    engine: Engine
    prompts: list[Prompt]
    sampling: Sampling

    def measure(self, policy: Policy, seed: tuple[int, ...]) -> Measured:
        """Raises `RewardError` where any score fails: a gold with holes cannot be compared with itself."""
        self.engine.update(policy.weights(), policy.version)
        completions = self.engine.generate(self.prompts, 1, self.sampling, seed)
        scores = self.reward.score(self.prompts, completions)
        check_failures(scores, 0.0)
        rows = sample_rows(self.prompts, completions, scores)
        return Measured(aggregate(rows), rows)


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`gold/<name>` with `/low` and `/high` (95 % interval) for each part of these sample records, `n`, lengths."""
    record: dict[str, Any] = {}
    for name in rows[0]["parts"]:
        values = [float(row["parts"][name]) for row in rows if row["parts"][name] is not None]
        if not values:
            raise UserError(
                f"gold {name!r} gave no score to any prompt: it returned None, which means it does not apply"
            )
        low, high = interval(values)
        record |= {f"gold/{name}": sum(values) / len(values), f"gold/{name}/low": low, f"gold/{name}/high": high}
    return record | {
        "n": len(rows),
        "length/mean": sum(row["tokens"] for row in rows) / len(rows),
        "length/truncated": sum(row["stop"] == "length" for row in rows) / len(rows),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for values of 0 and 1, Student's t otherwise."""
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    if all(v in (0.0, 1.0) for v in values):
        found = stats.binomtest(round(sum(values)), n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if n < 2:
        return -math.inf, math.inf
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return mean - reach, mean + reach
