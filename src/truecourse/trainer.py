"""Puts the live parts of a recipe together and runs its stages: the only place that knows both config and machinery."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truecourse import rewards
from truecourse.data import formats, sources
from truecourse.data.sequences import Prompt
from truecourse.data.split import split
from truecourse.data.template import Template, load_chat_template
from truecourse.errors import RunError, UserError
from truecourse.methods import grpo, sft
from truecourse.model import loading
from truecourse.model.loading import Loaded
from truecourse.model.policy import Policy
from truecourse.recipe import Grpo, Recipe, RewardPart, Sampling, Sft, Stage
from truecourse.recipe import load as load_recipe
from truecourse.rollout.local import LocalEngine
from truecourse.run import checkpoint, trackers
from truecourse.run.directory import RunDirectory
from truecourse.run.environment import differences, environment
from truecourse.run.gold import Gold
from truecourse.run.interrupt import StopFlag
from truecourse.run.loop import Loop
from truecourse.run.progress import Progress


@dataclass(frozen=True)
class Result:
    """A run that has ended or was interrupted."""

    path: Path
    """The run directory."""
    summary: dict[str, Any]
    """What summary.json holds."""


def train(recipe: Recipe | str | Path, *, quiet: bool = False) -> Result:
    """Run a recipe from its start. Raises `UserError` before anything is written where it cannot start."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = resolve(recipe.check())
    RunDirectory.check_free(recipe.out)
    settle(recipe)
    trackers.check(recipe.tracker)
    first = Built(recipe, 0, recipe.model)  # whatever is wrong with the first stage shows before the run exists
    run = RunDirectory.create(recipe.out, recipe, environment())
    return _run(run, recipe, quiet, first)


def resume(path: str | Path, *, quiet: bool = False) -> Result:
    """Continue an interrupted run from its last checkpoint, to the same bits as if it had never stopped."""
    run = RunDirectory.open(path)
    recipe = run.recipe()
    settle(recipe)
    for difference in differences(run.environment(), environment()):
        print(f"warning: {difference}, so the result may not be the same to the bit", file=sys.stderr)
    return _run(run, recipe, quiet, None)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with variants filled in and local paths made absolute, so that it means the same from anywhere."""
    stages = []
    for stage in recipe.stage:
        if isinstance(stage, Grpo):
            stage = grpo.resolve(stage)
        names = (stage.data,) if isinstance(stage.data, str) else stage.data
        data = tuple(_absolute(name) for name in names)
        parts = {"gold": tuple(map(_absolute_part, stage.gold))}
        if isinstance(stage, Grpo):
            parts["rewards"] = tuple(map(_absolute_part, stage.rewards))
        held = _absolute(stage.held_out) if isinstance(stage.held_out, str) else stage.held_out
        sampling = stage.gold_sampling or dataclasses.replace(getattr(stage, "sampling", Sampling()), temperature=0.0)
        changes: dict[str, Any] = {"held_out": held, "gold_sampling": sampling, **parts}
        stages.append(dataclasses.replace(stage, data=data[0] if len(data) == 1 else data, **changes))
    template = _absolute(recipe.chat_template) if recipe.chat_template else ""
    model = _absolute(recipe.model)
    return dataclasses.replace(recipe, model=model, chat_template=template, stage=tuple(stages)).check()


def model_folder(source: str) -> str:
    """`source`, or the checkpoint to keep where it is a run: the best by gold, else the last."""
    if not (Path(source) / "recipe.toml").is_file():
        return source
    run = RunDirectory.open(source)
    recipe = run.recipe()
    done = [i for i in range(len(recipe.stage)) if _result_step(run, recipe, i) >= 0]
    return str(stage_result(run, recipe, done[-1] if done else 0))


# -- running ----------------------------------------------------------------------------------------------------------


def settle(recipe: Recipe) -> None:
    """Process-wide settings that results depend on, bit for bit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _run(run: RunDirectory, recipe: Recipe, quiet: bool, first: Built | None) -> Result:
    with run.lock(), StopFlag() as flag:
        found = checkpoint.latest(run.path)
        begin, folder = (0, None) if found is None else (checkpoint.load_json(found[1])["stage"], found[1])
        run.rewind(-1 if found is None else found[0], begin)
        tracker = trackers.tracker(recipe.tracker, run.path, recipe, step=found[0] if found else 0)
        total = sum(stage.steps for stage in recipe.stage)
        status = "failed"
        try:
            run.summarise("running")
            for index in range(begin, len(recipe.stage)):
                source = recipe.model if index == 0 else str(stage_result(run, recipe, index - 1))
                built = first if first and index == 0 else Built(recipe, index, source)
                offset = _offset(recipe, index)
                title = f"{built.stage.method} {Path(recipe.out).name}"
                with Progress(total, offset, title, quiet=quiet) as display:
                    flag.notify = display.note
                    display.recall(e for e in run.evals() if e.get("stage") == index)
                    if built.loaded.note:
                        display.note(built.loaded.note)
                    loop = Loop(
                        built.stage, index, offset, built.method, built.policy, built.gold, run, display, tracker.log,
                        lambda: flag.requested, recipe.seed, {_result_step(run, recipe, i) for i in range(index)},
                    )  # fmt: skip
                    done = loop.restore(folder) if folder and index == begin else 0
                    status = loop.go(done, resumed=bool(folder) and index == begin)
                if flag.requested and index + 1 < len(recipe.stage):
                    status = "interrupted"
                if status == "interrupted":
                    break
        except BaseException as error:
            with contextlib.suppress(RunError):  # on a full disk the first error is the one to show
                run.summarise("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            tracker.close()
        return Result(run.path, run.summarise(status))


def _offset(recipe: Recipe, index: int) -> int:
    return sum(stage.steps for stage in recipe.stage[:index])


def stage_result(run: RunDirectory, recipe: Recipe, index: int) -> Path:
    """The checkpoint to keep of a stage: its best by gold, or its last. Raises `UserError` where there is none."""
    step = _result_step(run, recipe, index)
    folder = run.path / "checkpoints" / f"step-{step}"
    if not folder.is_dir():
        raise UserError(f"run {str(run.path)!r} has no checkpoint yet; continue it with `truecourse resume {run.path}`")
    return folder


def _result_step(run: RunDirectory, recipe: Recipe, index: int) -> int:
    first, last = _offset(recipe, index), _offset(recipe, index + 1)
    here = sorted(s for s, _ in checkpoint.found(run.path) if first < s <= last or (s == first and index == 0))
    gold = recipe.stage[index].gold
    values = {r["step"]: r[f"gold/{gold[0].label}"] for r in run.evals() if r["stage"] == index} if gold else {}
    scored = [s for s in here if s in values]
    if scored:
        return max(scored, key=lambda s: (values[s], -s))
    return here[-1] if here else -1


# -- one stage, alive --------------------------------------------------------------------------------------------------


class Built:
    """Everything that a stage needs, put together. Raises `UserError` for whatever the recipe gets wrong."""

    def __init__(self, recipe: Recipe, index: int, source: str) -> None:
        stage = self.stage = recipe.stage[index]
        train_rows, held_rows = split_rows(stage, recipe.seed)
        gold = rewards.build(stage.gold) if stage.gold else None  # a misnamed reward shows before a model is loaded
        reward = rewards.build(stage.rewards) if isinstance(stage, Grpo) else None
        device = loading.resolve_device(recipe.device)
        self.loaded = loading.load(source, device=device, dtype=recipe.dtype, lora=recipe.lora)
        self.template = template_of(self.loaded, recipe.chat_template)
        engine = engine_of(self.loaded, self.template)
        self.policy = Policy(
            self.loaded,
            reference=_reference(recipe, stage),
            micro_tokens=stage.micro_tokens,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        context = context_of(self.loaded)
        if isinstance(stage, Grpo):
            prompts = make_prompts(train_rows, stage, self.template, context, stage.sampling.max_tokens)
            if stage.prompts_per_step > len(prompts):
                raise UserError(
                    f"prompts_per_step = {stage.prompts_per_step}, but there are only {len(prompts)} training prompts; "
                    "lower it, or add data"
                )
            assert reward is not None
            self.method: Any = grpo.GRPO(stage, self.policy, engine, reward, prompts, recipe.seed)
        elif isinstance(stage, Sft):
            limit = min(context or stage.max_length, stage.max_length or context)
            demos = _demonstrations(train_rows, stage, self.template, limit)
            held = _demonstrations([row for row in held_rows if _answered(row)], stage, self.template, limit)
            self.method = sft.SFT(stage, self.policy, demos, held, recipe.seed)
        else:
            raise AssertionError(stage.method)
        self.gold = self._gold(gold, held_rows, engine, context) if gold else None

    def _gold(self, gold: rewards.Reward, held_rows: list[sources.Row], engine: LocalEngine, context: int) -> Gold:
        stage = self.stage
        assert stage.gold_sampling is not None
        prompts = make_prompts(held_rows, stage, self.template, context, stage.gold_sampling.max_tokens)
        if not prompts:
            raise UserError("a gold needs held-out prompts; set held_out to a share, a count or a file")
        return Gold(stage.gold[0].label, gold, engine, prompts[: stage.gold_prompts], stage.gold_sampling)


def read_rows(stage: Stage, source: str | tuple[str, ...]) -> list[sources.Row]:
    """The rows of a source, its columns renamed as the stage asks."""
    return sources.read(source, Path.cwd(), stage.columns)


def split_rows(stage: Stage, seed: int) -> tuple[list[sources.Row], list[sources.Row]]:
    """The stage's training rows and its held-out rows."""
    rows = read_rows(stage, stage.data)
    if isinstance(stage.held_out, str):
        return rows, held_out_rows(stage, seed)
    return split(rows, stage.held_out, seed) if stage.held_out else (rows, [])


def held_out_rows(stage: Stage, seed: int) -> list[sources.Row]:
    """The rows that the stage's gold is measured on."""
    return read_rows(stage, stage.held_out) if isinstance(stage.held_out, str) else split_rows(stage, seed)[1]


def template_of(loaded: Loaded, chat_template: str = "") -> Template:
    """The chat template of a model, or the one in the file that replaces it."""
    text = load_chat_template(chat_template, Path.cwd())
    return Template(loaded.tokenizer, text, loaded.end_ids)


def engine_of(loaded: Loaded, template: Template) -> LocalEngine:
    """The local engine over a loaded model."""
    return LocalEngine(loaded.model, template.end_ids, template.decode, packed=loaded.packed)


def context_of(loaded: Loaded) -> int:
    """Most positions of the model; 0 where its config names none."""
    return int(getattr(loaded.model.config, "max_position_embeddings", None) or 0)


def make_prompts(
    rows: list[sources.Row], stage: Stage, template: Template, context: int, max_tokens: int
) -> list[Prompt]:
    """Tokenised prompts, one for each row. Raises `UserError` naming the row whose prompt leaves no room to answer."""
    if context and max_tokens >= context:
        raise UserError(f"max_tokens = {max_tokens} leaves no room for a prompt in the model's context of {context}")
    found = [
        row._replace(content=with_system(row.content, stage.system))
        for row in formats.prompts_for_rl(rows, chat=stage.chat)
    ]
    return template.prompts(found, context - max_tokens if context else 0)


def with_system(content: formats.Content, system: str) -> formats.Content:
    """A chat prompt with this system message in front, unless it has one or there is none to add."""
    if not system or isinstance(content, str) or content[0]["role"] == "system":
        return content
    return [{"role": "system", "content": system}, *content]


def _demonstrations(rows: list[sources.Row], stage: Stage, template: Template, limit: int) -> list[sft.Demonstration]:
    return [
        template.demonstration(row._replace(prompt=with_system(row.prompt, stage.system)), limit)
        for row in formats.demonstrations(rows, chat=stage.chat)
    ]


def _answered(row: sources.Row) -> bool:
    """Held-out rows may be bare prompts, kept for the gold alone."""
    return "completion" in row.values or "messages" in row.values


def _reference(recipe: Recipe, stage: Stage) -> Any:
    if not isinstance(stage, Grpo):
        return "none"
    if stage.reference == "auto":
        return "adapter_off" if recipe.lora else "copy"
    return stage.reference


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() and name != "tiny" else name


def _absolute_part(part: RewardPart) -> RewardPart:
    path, colon, function = part.use.rpartition(":")
    return dataclasses.replace(part, use=f"{_absolute(path)}:{function}") if colon and path.endswith(".py") else part
