"""Makes the shipped tiny model again: `python -m truecourse.lab.build [FOLDER]`.

Random weights from a seed, then the recipe in `tiny/sft.toml` by the package's own SFT stage. One thread of a CPU makes
the same weights each time; another kind of CPU, or another version of torch, may round differently.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from truecourse import recipe as recipes
from truecourse import trainer
from truecourse.lab import tiny

KEPT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def build(folder: Path, *, quiet: bool = False) -> float:
    """Write the model to `folder`. Returns its sampled accuracy on `lab:sums-held-out`, measured where SFT stopped."""
    recipe = recipes.load(tiny.path() / "sft.toml")
    with tempfile.TemporaryDirectory() as scratch:
        fresh, out = Path(scratch) / "fresh", Path(scratch) / "run"
        tiny.save_new(fresh, recipe.seed)
        result = trainer.train(dataclasses.replace(recipe, model=str(fresh), out=str(out)), quiet=quiet)
        trained = Path(trainer.model_folder(str(result.path)))
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(trained / name, folder / name)
        gold = json.loads((result.path / "summary.json").read_text(encoding="utf-8"))["gold"]
    return float(gold[recipe.stage[0].gold[0].label]["best"])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny.path()
    print(f"{target}: {build(target):.3f} of the held-out sums sampled right")
