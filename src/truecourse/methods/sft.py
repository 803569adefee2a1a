"""SFT: project the policy onto samples of the optimum of J.

    J's optimum is π* ∝ π_ref · exp(r / β). Given samples y of π* (demonstrations), the nearest policy in KL(π* ‖ π)
    maximises E_{y~π*}[ log π(y|x) ]: the loss is the mean negative log-likelihood of the completion tokens.

Departures from common trainers: the loss is the mean over the completion tokens of the whole batch, whatever the
micro-batches; prompt tokens carry no loss; the end token is part of every completion, so that ending is learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from truecourse.data.order import fingerprint, refuse_other_data, take
from truecourse.data.sequences import Batch
from truecourse.model.policy import Policy
from truecourse.objective.surrogate import token_weights
from truecourse.recipe import Sft
from truecourse.run.loop import StepResult

ROLES = ("policy",)
"""Models held in memory while it trains."""

Demonstration = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt tokens and completion tokens, the end token included."""


class SFT:
    """One `step` is one optimiser update on `batch_size` demonstrations."""

    def __init__(
        self, config: Sft, policy: Policy, demonstrations: list[Demonstration], held_out: list[Demonstration], seed: int
    ) -> None:
        self.config, self.policy, self.seed = config, policy, seed
        self.demonstrations, self.held_out = demonstrations, held_out
        self.cursor = 0

    def step(self, step: int, lr: float, phase: Callable[[str], None]) -> StepResult:
        policy, started = self.policy, time.perf_counter()
        rows = take(self.cursor, self.config.batch_size, len(self.demonstrations), self.seed)
        self.cursor += self.config.batch_size
        batch = _batch([self.demonstrations[i] for i in rows])
        weight_T = token_weights(batch.lengths_N, "token").to(policy.device)
        loss, entropy = 0.0, 0.0
        parts = policy.micro_batches(batch)
        for i, part in enumerate(parts):
            phase(f"training, micro-batch {i + 1} of {len(parts)}")
            logp_T, entropy_T = policy.logprobs(part.batch)
            part_loss = -(logp_T * weight_T[part.tokens]).sum()
            policy.backward(part_loss)
            loss += float(part_loss.detach())
            entropy += float((entropy_T.detach() * weight_T[part.tokens]).sum())
        return StepResult(
            {
                "loss": loss,
                "entropy": entropy,
                "grad_norm": policy.step(lr),
                "epoch": self.cursor / len(self.demonstrations),
                "tokens/prompt": sum(len(p) for p in batch.prompts),
                "tokens/completion": sum(batch.lengths_N),
                "time/train": time.perf_counter() - started,
            }
        )

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood (nats per token) of the held-out demonstrations."""
        if not self.held_out:
            return {}
        return {"loss/held_out": -float(self.policy.score(_batch(self.held_out)).mean())}

    def state(self) -> dict[str, Any]:
        return {"data": self._data(), "cursor": self.cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        refuse_other_data(state["data"], self._data())
        self.cursor = state["cursor"]

    def _data(self) -> str:
        return fingerprint(tokens for pair in self.demonstrations for tokens in pair)


def _batch(rows: list[Demonstration]) -> Batch:
    return Batch([prompt for prompt, _ in rows], [completion for _, completion in rows], range(len(rows)))
