"""What every sampler looks like to the rest of the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from truecourse.data.sequences import Completion, Prompt
from truecourse.recipe import Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """A sampler of completions, holding some version of the policy's weights."""

    version: int
    """Version of the weights that it samples with now; every completion carries it."""
    exact: bool
    """True where it samples from the trainer's own model, in the same process: its log-probs are the trainer's."""

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: tuple[int, ...]
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, in the prompts' order.

        A request's random stream comes from (`seed`..., `prompt.index`, sample index), so what is sampled depends
        neither on batching, nor on the order of the prompts, nor on the presence of others.
        Raises `UserError` where a prompt and its completion cannot fit the model's context.
        """
        ...

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample with these weights from now on."""
        ...


@dataclass(frozen=True)
class Stats:
    """What one `generate` did."""

    prompt_tokens: int = 0
    """Prompt tokens run through the model (each prompt once for its group, where the engine shares them)."""
    completion_tokens: int = 0
    """Tokens sampled, end tokens included."""
    decode_steps: int = 0
    """Forward passes of one new token for each row of the batch."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    occupancy: float = 0.0
    """Share of the rows run in decode steps whose completion was still unfinished (0–1); 0 without decode steps."""
