"""Measuring and sampling from a model that is not being trained: `truecourse eval` and `truecourse sample`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from truecourse import rewards, trainer
from truecourse.data.order import fingerprint
from truecourse.data.sequences import Message, Prompt
from truecourse.errors import UserError
from truecourse.model import loading
from truecourse.recipe import Grpo, Recipe, RewardPart, Sampling, Stage
from truecourse.run.directory import RunDirectory
from truecourse.run.gold import aggregate
from truecourse.run.samples import sample_rows

AT_ONCE = 8
"""Prompts that are answered, scored and kept together: what a kill can lose."""


def run(
    source: str, *, data: str, use: str, prompts: int, max_tokens: int, temperature: float, columns: dict[str, str],
    chat: bool, system: str, out: str, as_json: bool, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure `source` on held-out prompts; prints a table or JSON, returns the record.

    Raises `UserError` where it is not said what to measure.
    """
    recipe, stage = _recipe_of(source)
    stage = _asked(stage, data, use, prompts, max_tokens, temperature, columns, chat, system)
    assert stage.gold_sampling is not None
    if out:
        _make_room(Path(out))
    rows = trainer.held_out_rows(stage)[: stage.gold_prompts]
    reward = rewards.build(stage.gold)
    loaded, template = _load(source, recipe)
    engine = trainer.engine_of(loaded, template)
    asked = trainer.make_prompts(
        rows, stage, template, trainer.context_of(loaded), stage.gold_sampling.max_tokens, reward
    )
    settings = {
        "data": fingerprint(p.tokens for p in asked),
        "model": trainer.model_folder(source),
        "sampling": dataclasses.asdict(stage.gold_sampling),
        "gold": [dataclasses.asdict(part) for part in stage.gold],
        "seed": seed,
    }
    kept = _kept(Path(out), settings) if out else {}
    todo = [p for p in asked if p.index not in kept]
    with _bar() as bar:
        task = bar.add_task("evaluating", total=len(asked), completed=len(asked) - len(todo))
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            completions = engine.generate(part, 1, stage.gold_sampling, (seed, 0))
            scores = reward.score(part, completions)
            rewards.check_failures(scores, 0.0)
            for row in sample_rows(part, completions, scores):
                kept[row["prompt_index"]] = row
                if out:
                    with Path(out).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            done = len(asked) - len(todo) + start + len(part)
            bar.update(task, completed=done)
            if bar.disable:  # a log file: a line now and then
                print(f"evaluating {done}/{len(asked)}", file=sys.stderr, flush=True)
    record = aggregate([kept[p.index] for p in asked])
    folder = trainer.model_folder(source)
    _print(source if folder == source else f"{source}, {Path(folder).name}", record, as_json)
    return record


def sample(
    source: str, text: str, *, n: int, max_tokens: int, temperature: float, top_p: float, top_k: int,
    stop: tuple[str, ...], plain: bool, system: str, seed: int,
) -> list[str]:  # fmt: skip
    """Answer `text` n times; prints the answers, returns them."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
    sampling.check()
    if n < 1:
        raise UserError(f"n = {n} must be at least 1")
    recipe, _ = _recipe_of(source)
    loaded, template = _load(source, recipe)
    content: str | list[Message] = text
    if not plain and (template.chat_template or template.tokenizer.chat_template):
        content = trainer.with_system([{"role": "user", "content": text}], system)
    prompt = Prompt(0, content, template.prompt_tokens(content, "the prompt"), {})
    context = trainer.context_of(loaded)
    if context and len(prompt.tokens) + max_tokens > context:
        room = context - len(prompt.tokens)
        fix = f"use --max-tokens {room} or less" if room > 0 else "shorten the prompt"
        raise UserError(
            f"the prompt's {len(prompt.tokens)} tokens and --max-tokens {max_tokens} do not fit the model's context of "
            f"{context}; {fix}"
        )
    (completions,) = trainer.engine_of(loaded, template).generate([prompt], n, sampling, (seed, 0))
    for i, completion in enumerate(completions):
        if n > 1:
            print(f"--- {i + 1} of {n}")
        print(completion.text + (" … (cut at --max-tokens)" if completion.stop == "length" else ""))
    return [c.text for c in completions]


def _recipe_of(source: str) -> tuple[Recipe, Stage | None]:
    """The recipe of a run and its last stage with a gold; a bare model has an empty recipe."""
    if not (Path(source) / "recipe.toml").is_file():
        return Recipe(model=source), None
    recipe = RunDirectory.open(source).recipe()
    return recipe, next((stage for stage in reversed(recipe.stage) if stage.gold), None)


def _load(source: str, recipe: Recipe) -> Any:
    trainer.settle(recipe)
    device = loading.resolve_device(recipe.device)
    loaded = loading.load(trainer.model_folder(source), device=device, dtype=recipe.dtype)
    return loaded, trainer.template_of(loaded, recipe.chat_template)


def _asked(
    stage: Stage | None, data: str, use: str, prompts: int, max_tokens: int, temperature: float,
    columns: dict[str, str], chat: bool, system: str,
) -> Stage:  # fmt: skip
    """The stage to measure by: the run's own, changed as asked; for a bare model, made from what was asked."""
    if stage is None:
        if not data or not use:
            raise UserError(
                "say what to measure on: --data FILE and --use VERIFIER, for example --data test.jsonl --use number "
                "(a run that has a gold needs neither)"
            )
        stage = Grpo(data=data, held_out=data, gold_prompts=1 << 31, gold_sampling=Sampling(temperature=0.0))
    sampling = stage.gold_sampling or Sampling(temperature=0.0)
    if max_tokens:
        sampling = dataclasses.replace(sampling, max_tokens=max_tokens)
    if temperature >= 0:
        sampling = dataclasses.replace(sampling, temperature=temperature)
    sampling.check()
    changes: dict[str, Any] = {"gold_sampling": sampling}
    if data:
        changes |= {"data": data, "held_out": data}
    if use:
        changes["gold"] = (RewardPart(use=use),)
    if prompts:
        changes["gold_prompts"] = prompts
    if columns:
        changes["columns"] = columns
    return dataclasses.replace(stage, **changes, chat=stage.chat or chat, system=system or stage.system)


def _make_room(path: Path) -> None:
    """Raise `UserError` where no file can be kept at `path`, before any work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {str(path)!r} cannot be written: {path.parent} is not a folder ({error.strerror})"
        ) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out {str(path)!r} cannot be written; name a .jsonl file in a folder of yours")


def _kept(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Answers of an earlier, killed call in this file, by prompt index. A line that the kill cut short is dropped.

    Raises `UserError` where the file was made with other settings.
    """
    head = json.dumps({"settings": settings}, ensure_ascii=False)
    if not path.exists():
        path.write_text(head + "\n", encoding="utf-8")
        return {}
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    if not lines or lines[0] != head:
        raise UserError(f"{str(path)!r} holds an evaluation with other settings; choose another --out, or remove it")
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {row["prompt_index"]: row for row in map(json.loads, lines[1:])}


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _print(source: str, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        json.dump(record, sys.stdout)
        print()
        return
    table = Table(title=f"{source}, {record['n']} prompts")
    for heading in ("measure", "mean", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for key in [k for k in record if k.startswith("gold/") and k.count("/") == 1]:
        table.add_row(key[5:], f"{record[key]:.3f}", f"{record[key + '/low']:.3f} to {record[key + '/high']:.3f}")
    table.add_row("tokens per answer", f"{record['length/mean']:.1f}", "")
    table.add_row("cut at max_tokens", f"{record['length/truncated']:.1%}", "")
    Console().print(table)
