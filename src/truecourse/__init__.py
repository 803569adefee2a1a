"""Align language models, and show with measurements whether the run can be trusted.

`import truecourse` is light: torch and transformers load when a run starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truecourse.errors import RunError, UserError
    from truecourse.recipe import Dpo, Grpo, Lora, Recipe, RewardPart, Sampling, Sft
    from truecourse.trainer import Result, resume, train

_HOME = {
    "trainer": ("train", "resume", "Result"),
    "recipe": ("Recipe", "Dpo", "Grpo", "Sft", "Lora", "Sampling", "RewardPart"),
    "errors": ("UserError", "RunError"),
}
__all__ = [
    "Dpo",
    "Grpo",
    "Lora",
    "Recipe",
    "Result",
    "RewardPart",
    "RunError",
    "Sampling",
    "Sft",
    "UserError",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"truecourse.{module}"), name)
    raise AttributeError(f"module 'truecourse' has no attribute {name!r}")
