"""Puts the live parts of a recipe together and runs its stages: the only place that knows both config and machinery."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truecourse import rewards
from truecourse.data import formats, pairs, sources
from truecourse.data.sequences import Prompt
from truecourse.data.split import leaks, split
from truecourse.data.template import Template, load_chat_template
from truecourse.errors import RunError, UserError
from truecourse.methods import dpo, grpo, sft
from truecourse.model import loading
from truecourse.model.loading import Loaded
from truecourse.model.policy import Policy
from truecourse.recipe import Dpo, Grpo, Recipe, RewardPart, Sampling, Sft, Stage
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
    trained: bool = True
    """False where there was nothing left to do."""


def train(recipe: Recipe | str | Path, *, quiet: bool = False) -> Result:
    """Run a recipe from its start. Raises `UserError` before anything is written where it cannot start."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = resolve(recipe.check())
    RunDirectory.check_free(recipe.out)
    settle(recipe)
    trackers.check(recipe.tracker)
    ready = {recipe.model: Built(recipe, 0, recipe.model)}  # what is wrong with it shows before the run exists
    run = RunDirectory.create(recipe.out, recipe, environment())
    return _run(run, recipe, quiet, ready)


def resume(path: str | Path, *, quiet: bool = False) -> Result:
    """Continue an interrupted run from its last checkpoint, to the same bits as if it had never stopped.

    A run that has ended is left as it is.
    """
    run = RunDirectory.open(path)
    recipe = run.recipe()
    if ended := run.ended():
        print(f"run {run.path} has ended ({ended['status']}): there is nothing to resume", file=sys.stderr)
        return Result(run.path, ended, trained=False)
    settle(recipe)
    for difference in differences(run.environment(), environment()):
        print(f"warning: {difference}, so the result may not be the same to the bit", file=sys.stderr)
    return _run(run, recipe, quiet, {})


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with variants filled in and local paths made absolute, so that it means the same from anywhere."""
    stages = []
    for stage in recipe.stage:
        if isinstance(stage, Grpo):
            stage = grpo.resolve(stage)
        elif isinstance(stage, Dpo):
            stage = dpo.resolve(stage)
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
    model = model_folder(_absolute(recipe.model))
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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order each time
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _run(run: RunDirectory, recipe: Recipe, quiet: bool, ready: dict[str, Built]) -> Result:
    """Train from the last checkpoint on; `ready` holds the first stage, by its source, where it is new."""
    with run.lock(), StopFlag() as flag, _told(run, fresh=bool(ready)):
        found = checkpoint.latest(run.path)
        begin = checkpoint.load_json(found[1])["stage"] if found else 0
        run.rewind(found[0] if found else -1, begin)
        if not run.environment():  # killed while the run was being made
            run.write_environment(environment())
        tracker = trackers.tracker(recipe.tracker, run.path, recipe, step=found[0] if found else 0)
        with contextlib.closing(tracker):
            run.summarise("running")
            for index in range(begin, len(recipe.stage)):
                folder = found[1] if found and index == begin else None
                status = _stage(run, recipe, index, folder, ready, flag, tracker, quiet)
                if flag.requested and index + 1 < len(recipe.stage):
                    status = "interrupted"
                if status == "interrupted":
                    break
        return Result(run.path, run.summarise(status))


def _stage(
    run: RunDirectory, recipe: Recipe, index: int, folder: Path | None, ready: dict[str, Built], flag: StopFlag,
    tracker: trackers.Tracker, quiet: bool,
) -> str:  # fmt: skip
    """One stage, from its checkpoint `folder` where there is one. What it built is gone when it returns."""
    source, offset = stage_source(run, recipe, index), _offset(recipe, index)
    built = ready.pop(source, None) if index == 0 else None
    built = built or Built(recipe, index, source)
    title = f"{built.stage.method} {Path(recipe.out).name}"
    with Progress(_offset(recipe, len(recipe.stage)), offset, title, quiet=quiet) as display:
        flag.notify = display.note
        built.engine.on_progress = lambda tokens, rows: display.phase(f"sampling, {tokens:,} tokens, {rows} rows live")
        display.recall(e for e in run.evals() if e.get("stage") == index)
        for note in built.notes:
            display.note(note)
        keep = {_result_step(run, recipe, i) for i in range(index)}
        loop = Loop(
            built.stage, index, offset, built.method, built.policy, built.gold, run, display, tracker.log,
            lambda: flag.requested, recipe.seed, keep,
        )  # fmt: skip
        done = loop.restore(folder) if folder else 0
        return loop.go(done, resumed=folder is not None)


@contextlib.contextmanager
def _told(run: RunDirectory, fresh: bool) -> Iterator[None]:
    """Whatever ends the run before its end is told in its summary; a mistake before the first step of a new run, such
    as a reward that fails, leaves no run behind: once mended, it starts again under the same name."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _fail(run, "failed")
        raise RunError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}). Lower micro_tokens, or set "
            f"gradient_checkpointing = true; every step up to the last checkpoint is safe in {run.path}"
        ) from error
    except BaseException as error:
        if fresh and isinstance(error, UserError) and not run.metrics():
            shutil.rmtree(run.path)
        else:
            stopped = isinstance(error, KeyboardInterrupt)
            _fail(run, "interrupted" if stopped else "failed")
            if stopped:
                print(f"continue with: truecourse resume {run.path}", file=sys.stderr)
        raise


def _fail(run: RunDirectory, status: str) -> None:
    with contextlib.suppress(RunError):  # on a full disk the first error is the one to show
        run.summarise(status)


def _offset(recipe: Recipe, index: int) -> int:
    return sum(stage.steps for stage in recipe.stage[:index])


def stage_result(run: RunDirectory, recipe: Recipe, index: int) -> Path:
    """The checkpoint to keep of a stage: its best by gold, or its last. Raises `UserError` where there is none."""
    step = _result_step(run, recipe, index)
    folder = run.path / "checkpoints" / f"step-{step}"
    if not folder.is_dir():
        raise UserError(f"run {str(run.path)!r} has no checkpoint yet; continue it with `truecourse resume {run.path}`")
    return folder


def stage_source(run: RunDirectory, recipe: Recipe, index: int) -> str:
    """What stage `index` starts from: the recipe's model, or the result of the stage before.

    Adapters are kept beside the plain weights that they belong to. Where new ones go on top of older ones, those are
    merged first, into the run's own `base-INDEX`.
    """
    source = recipe.model if index == 0 else str(stage_result(run, recipe, index - 1))
    if recipe.lora is None or not (Path(source) / "adapter_config.json").is_file():
        return source
    folder = run.path / f"base-{index}"
    if not folder.is_dir():
        merged = loading.load(source, device=torch.device("cpu"), dtype=recipe.dtype)

        def write(aside: Path) -> None:
            merged.model.save_pretrained(str(aside))
            merged.tokenizer.save_pretrained(str(aside))

        checkpoint.write_folder(folder, write)
    return str(folder)


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
        self.source = source
        skipped: list[str] = []
        train_rows, held_rows = split_rows(stage, skipped)
        gold = rewards.build(stage.gold) if stage.gold else None  # a misnamed reward shows before a model is loaded
        reward = rewards.build(stage.rewards) if isinstance(stage, Grpo) else None
        device = loading.resolve_device(recipe.device)
        torch.manual_seed(hash((recipe.seed, -1, index)))  # new adapters are drawn at random
        self.loaded = loading.load(source, device=device, dtype=recipe.dtype, lora=recipe.lora)
        self.template = template_of(self.loaded, recipe.chat_template)
        engine = self.engine = engine_of(self.loaded, self.template)
        self.policy = Policy(
            self.loaded,
            reference=_reference(recipe, stage),
            micro_tokens=stage.micro_tokens or (2048 if device.type == "cpu" else 16384),
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            gradient_checkpointing=recipe.gradient_checkpointing,
        )
        context = context_of(self.loaded)
        self.notes = [note for note in (self.loaded.note, _leaks(train_rows, held_rows), *skipped) if note]
        """What the user should know before the first step."""
        if isinstance(stage, Grpo):
            assert reward is not None
            prompts = make_prompts(train_rows, stage, self.template, context, stage.sampling.max_tokens, reward)
            if stage.prompts_per_step > len(prompts):
                raise UserError(
                    f"prompts_per_step = {stage.prompts_per_step}, but there are only {len(prompts)} training prompts; "
                    "lower it, or add data"
                )
            self.method: Any = grpo.GRPO(stage, self.policy, engine, reward, prompts, recipe.seed)
        elif isinstance(stage, Sft):
            limit = min(context or stage.max_length, stage.max_length or context)
            demos = _demonstrations(train_rows, stage, self.template, limit)
            held = _demonstrations([row for row in held_rows if _answered(row)], stage, self.template, limit)
            self.method = sft.SFT(stage, self.policy, demos, held, recipe.seed)
        elif isinstance(stage, Dpo):
            limit = min(context or stage.max_length, stage.max_length or context)
            compared = [row for row in held_rows if pairs.compared(row)]
            trained_on = _pairs(train_rows, stage, self.template, limit, self.notes)
            held_pairs = _pairs(compared, stage, self.template, limit, self.notes)
            self.method = dpo.DPO(stage, self.policy, trained_on, held_pairs, recipe.seed)
        else:
            raise AssertionError(stage.method)
        self.gold = self._gold(gold, held_rows, engine, context) if gold else None

    def _gold(self, gold: rewards.Reward, held_rows: list[sources.Row], engine: LocalEngine, context: int) -> Gold:
        stage = self.stage
        assert stage.gold_sampling is not None
        if not held_rows:
            raise UserError("a gold needs held-out prompts; set held_out to a share, a count or a file")
        rows = held_rows[: stage.gold_prompts]
        prompts = make_prompts(rows, stage, self.template, context, stage.gold_sampling.max_tokens, gold)
        return Gold(stage.gold[0].label, gold, engine, prompts, stage.gold_sampling)


def read_rows(stage: Stage, source: str | tuple[str, ...], skipped: list[str] | None = None) -> list[sources.Row]:
    """The rows of a source, its columns renamed as the stage asks. Comparisons are given a prompt each; what is told of
    malformed ones goes to `skipped`."""
    rows = sources.read(source, Path.cwd(), stage.columns)
    if isinstance(stage, Dpo):
        count = len(rows)
        rows, problems = pairs.comparisons(rows, stage.prompt_end)
        told = pairs.settle(problems, stage.bad_pairs, "bad_pairs", count)
        if not rows:
            raise UserError(f"no pair is left: {told}")
        if skipped is not None and told:
            skipped.append(told)
    return rows


def split_rows(stage: Stage, skipped: list[str] | None = None) -> tuple[list[sources.Row], list[sources.Row]]:
    """The stage's training rows and its held-out rows, the same whatever the seed, so that seeds compare."""
    rows = read_rows(stage, stage.data, skipped)
    if isinstance(stage.held_out, str):
        return rows, read_rows(stage, stage.held_out, skipped)
    return split(rows, stage.held_out) if stage.held_out else (rows, [])


def held_out_rows(stage: Stage) -> list[sources.Row]:
    """The rows that the stage's gold is measured on."""
    return read_rows(stage, stage.held_out) if isinstance(stage.held_out, str) else split_rows(stage)[1]


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
    rows: list[sources.Row], stage: Stage, template: Template, context: int, max_tokens: int, reward: rewards.Reward
) -> list[Prompt]:
    """Tokenised prompts, one for each row. Raises `UserError` naming the row whose prompt leaves no room to answer, or
    which lacks a column that the reward needs."""
    if context and max_tokens >= context:
        raise UserError(f"max_tokens = {max_tokens} leaves no room for a prompt in the model's context of {context}")
    found = [
        row._replace(content=with_system(row.content, stage.system))
        for row in formats.prompts_for_rl(rows, chat=stage.chat)
    ]
    for row in {tuple(row.columns): row for row in reversed(found)}.values():
        try:
            reward.check_columns(row.columns)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
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


def _pairs(
    rows: list[sources.Row], stage: Dpo, template: Template, limit: int, notes: list[str]
) -> list[pairs.TokenPair]:
    found = [
        pair._replace(prompt=with_system(pair.prompt, stage.system)) for pair in pairs.pairs(rows, chat=stage.chat)
    ]
    good, same, long = pairs.tokenise(found, template, limit)
    told = (
        pairs.settle(same, stage.bad_pairs, "bad_pairs", len(rows)),
        pairs.settle(long, stage.long_pairs, "long_pairs", len(rows)),
    )
    notes += [note for note in told if note]
    if rows and not good:
        raise UserError(f"no pair is left of {len(rows)}: {'; '.join(filter(None, told))}")
    return good


def _answered(row: sources.Row) -> bool:
    """Held-out rows may be bare prompts, kept for the gold alone."""
    return "completion" in row.values or "messages" in row.values


def _leaks(train_rows: list[sources.Row], held_rows: list[sources.Row]) -> str:
    found = leaks(train_rows, held_rows)
    if not found:
        return ""
    trained, held = found[0]
    return (
        f"warning: {len(found)} of {len(held_rows)} held-out prompts are trained on as well, so the gold is too good "
        f"(the first: {held.where} is {trained.where})"
    )


def _reference(recipe: Recipe, stage: Stage) -> Any:
    if not isinstance(stage, Grpo | Dpo):
        return "none"
    if stage.reference == "auto":
        return "adapter_off" if recipe.lora else "copy"
    return "none" if stage.reference == "stored" else stage.reference


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() and name != "tiny" else name


def _absolute_part(part: RewardPart) -> RewardPart:
    path, colon, function = part.use.rpartition(":")
    return dataclasses.replace(part, use=f"{_absolute(path)}:{function}") if colon and path.endswith(".py") else part
