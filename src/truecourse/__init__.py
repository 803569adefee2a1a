"""Align language models, and show with measurements whether the run can be trusted.

`import truecourse` is light: torch and transformers load when a run starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from truecourse.errors import RunError, UserError
    from truecourse.recipe import Grpo, Lora, Recipe, RewardPart, Sampling, Sft
    from truecourse.trainer import Result, resume, train

_HOME = {
    "train": "trainer", "resume": "trainer", "Result": "trainer",
    "Recipe": "recipe", "Grpo": "recipe", "Sft": "recipe", "Lora": "recipe", "Sampling": "recipe", "RewardPart": "recipe",
    "UserError": "errors", "RunError": "errors",
}  # fmt: skip
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'truecourse' has no attribute {name!r}")
    return getattr(importlib.import_module(f"truecourse.{_HOME[name]}"), name)
