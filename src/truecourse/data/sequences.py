"""The ragged types that every room shares: a prompt, a completion, a batch of them.

Shape suffixes used throughout the package:
    P prompts   G completions of one prompt (the group)   N = P·G completions
    T completion tokens of all N, end to end, no padding   V vocabulary   D hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

StopReason = Literal["eos", "stop", "length"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the reward sees it (`content`, `row`) and as the model sees it (`tokens`)."""

    index: int
    """Row in its data set: the identity behind a request's random stream."""
    content: str | list[Message]
    """The user's own form: plain text, or chat messages."""
    tokens: tuple[int, ...]
    """Rendered through the chat template and tokenised once; at least one token."""
    row: dict[str, Any] = field(default_factory=dict)
    """The other columns of the row; they reach the reward by name."""


@dataclass(frozen=True)
class Completion:
    """What a sampler returned for one prompt: exactly the tokens it sampled, never re-tokenised text."""

    tokens: tuple[int, ...]
    """Sampled ids, the end token included where it was sampled; at least one."""
    logps: tuple[float, ...]
    """Log-prob (nats) of each token under the distribution it was drawn from, temperature included."""
    stop: StopReason
    """Why it ended: an end-of-turn token, a stop string, or the length limit."""
    version: int
    """Version of the weights that sampled it."""
    text: str
    """Decoded without special tokens; a stop string and what follows it cut off."""


@dataclass(frozen=True)
class Batch:
    """Completions over the prompts that they share, ragged.

    The model runs each prompt once, however many completions point at it.
    """

    prompts: Sequence[Sequence[int]]
    """P token sequences, each at least one token."""
    completions: Sequence[Sequence[int]]
    """N token sequences, each at least one token."""
    owner: Sequence[int]
    """N indices into `prompts`, in ascending order."""

    def __post_init__(self) -> None:
        assert len(self.owner) == len(self.completions), "one owner for each completion"
        assert all(a <= b for a, b in zip(self.owner, self.owner[1:], strict=False)), "completions follow their prompts"
        assert all(self.prompts) and all(self.completions), "empty sequence"

    @property
    def lengths_N(self) -> list[int]:
        return [len(c) for c in self.completions]
