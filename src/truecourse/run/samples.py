"""The record of a sampled completion with its scores: a line of rollouts/*.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from truecourse.data.sequences import Completion, Prompt
from truecourse.rewards import Scores


def sample_rows(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], scores: Scores
) -> list[dict[str, Any]]:
    """One record for each completion, prompt by prompt. A score that failed is None."""
    return [
        {
            "prompt_index": prompt.index,
            "sample": g,
            "prompt": prompt.content,
            "completion": completion.text,
            "tokens": len(completion.tokens),
            "stop": completion.stop,
            "reward": real(scores.values_PG[p][g]),
            "parts": {name: real(values[p][g]) for name, values in scores.parts.items()},
            "version": completion.version,
        }
        for p, prompt in enumerate(prompts)
        for g, completion in enumerate(completions[p])
    ]


def real(value: float | None) -> float | None:
    """`value`, or None for NaN."""
    return None if value is None or value != value else value
