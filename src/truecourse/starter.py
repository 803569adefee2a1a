"""`truecourse init`: a recipe to start from, its comments taken from the fields' own docstrings."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

import tomli_w

from truecourse.errors import UserError
from truecourse.recipe import STAGES, Dpo, Grpo, Lora, Recipe, RewardPart, Sampling, Sft, field_docs, to_table

# What most runs set, with values that run as they are on the shipped tiny model.
EXAMPLES: dict[str, Grpo | Sft | Dpo] = {
    "grpo": Grpo(
        data="lab:sums",
        held_out="lab:sums-held-out",
        rewards=(RewardPart(use="exact"),),
        gold=(RewardPart(use="exact", name="correct"),),
        sampling=Sampling(max_tokens=8),
        steps=150,
        lr=1e-3,
        prompts_per_step=32,
        group_size=8,
        gold_every=25,
    ),
    "sft": Sft(
        data="lab:sums-demos",
        held_out="lab:sums-held-out",
        gold=(RewardPart(use="exact", name="correct"),),
        gold_sampling=Sampling(temperature=0.0, max_tokens=8),
        steps=100,
        lr=1e-3,
        gold_every=25,
    ),
    "dpo": Dpo(
        data="lab:sums-pairs",
        held_out="lab:sums-pairs-held-out",
        gold=(RewardPart(use="exact", name="correct"),),
        gold_sampling=Sampling(temperature=0.0, max_tokens=8),
        steps=300,
        lr=1e-3,
        beta=0.5,
        gold_every=50,
    ),
}
COMMON: dict[type, tuple[str, ...]] = {
    Recipe: ("model", "out", "seed"),
    Grpo: (
        "data",
        "held_out",
        "steps",
        "lr",
        "prompts_per_step",
        "group_size",
        "variant",
        "beta",
        "gold_every",
        "micro_tokens",
    ),
    Sft: ("data", "held_out", "steps", "lr", "batch_size", "gold_every", "micro_tokens"),
    Dpo: (
        "data",
        "held_out",
        "steps",
        "lr",
        "batch_size",
        "variant",
        "beta",
        "reference",
        "bad_pairs",
        "gold_every",
        "micro_tokens",
    ),
}
TABLES = ("sampling", "gold_sampling", "rewards", "gold", "columns")


def write(path: Path, method: str, every_key: bool) -> None:
    """Write the recipe. Raises `UserError` for an unknown method, an existing file, or a folder that is not there."""
    if method not in EXAMPLES:
        raise UserError(f"method {method!r} is not one of {', '.join(STAGES)}")
    if path.exists():
        raise UserError(f"{path} exists already; name another file")
    try:
        path.write_text(text(method, every_key), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def text(method: str, every_key: bool = False) -> str:
    """The recipe as commented TOML; it loads and runs as it is."""
    stage = EXAMPLES[method]
    parts = [
        "# A truecourse recipe: run it with `truecourse train FILE`. Any key can be changed on the way:",
        "# `truecourse train FILE --set lr=1e-5`. What is written here runs as it is on the shipped tiny model.\n",
        _keys(Recipe(out=f"runs/{method}"), every_key),
        _table("# [lora]", Lora(), ("rank", "alpha") if not every_key else (), commented=True),
        f'[[stage]]\nmethod = "{method}"\n',
        _keys(stage, every_key),
    ]
    if isinstance(stage, Grpo):
        parts.append(_table("[stage.sampling]", stage.sampling, () if every_key else ("max_tokens", "temperature")))
        parts += [_table("[[stage.rewards]]", part, ("use", "weight")) for part in stage.rewards]
    elif stage.gold_sampling:
        parts.append(_table("[stage.gold_sampling]", stage.gold_sampling, ("max_tokens", "temperature")))
    parts += [_table("[[stage.gold]]", part, ("use", "name")) for part in stage.gold]
    return "\n".join(parts)


def _keys(config: Any, every_key: bool) -> str:
    names = [f.name for f in dataclasses.fields(config) if f.name not in (*TABLES, "stage", "lora")]
    kept = [n for n in names if every_key or n in COMMON[type(config)]]
    return _lines(config, sorted(kept, key=COMMON[type(config)].index) if not every_key else kept)


def _table(head: str, config: Any, names: tuple[str, ...], commented: bool = False) -> str:
    kept = names or tuple(f.name for f in dataclasses.fields(config))
    return head + "\n" + _lines(config, list(kept), commented)


def _lines(config: Any, names: list[str], commented: bool = False) -> str:
    docs, table, out = field_docs(type(config)), to_table(config), []
    for name in names:
        out += textwrap.wrap(docs[name], 110, initial_indent="# ", subsequent_indent="# ")
        if name in table:
            line = tomli_w.dumps({name: table[name]}).strip()
            out.append(f"# {line}" if commented or line.startswith("[") else line)
        else:  # unset: the variant decides
            out.append(f"# {name} =")
    return "\n".join(out) + "\n"
