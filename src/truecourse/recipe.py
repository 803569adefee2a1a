"""The recipe: everything a run depends on, typed, checked at load, written back whole.

One TOML file, one or more `[[stage]]` tables. Every field below carries its meaning, unit, and source or reason; the
command line's help, `truecourse init` and the reference page are made from these docstrings.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from truecourse.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of full fine-tuning (Hu et al. 2021), by peft."""

    rank: int = 16
    """Rank of the update matrices. 8–64 is common; 16 is peft users' usual start."""
    alpha: int = 32
    """Scale numerator: the update is multiplied by alpha / rank. Twice the rank is the common choice."""
    dropout: float = 0.0
    """Share of adapter inputs dropped. 0 keeps sampler and trainer the same policy."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter; every linear layer but the head by default (QLoRA, §4)."""
    quantize: Literal["none", "4bit"] = "none"
    """`4bit` loads the frozen base in NF4 by bitsandbytes (QLoRA, Dettmers et al. 2023); needs a CUDA GPU."""

    def check(self) -> None:
        _at_least(self, rank=1, alpha=1, dropout=0.0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    max_tokens: int = 256
    """Most tokens of a completion; one that reaches it without ending is counted as truncated."""
    temperature: float = 1.0
    """Softmax temperature; 0 is greedy. The trainer scores at the same temperature."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this much probability. Below 1 is refused in training: the sampled
    distribution would no longer be the policy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off. Refused in training, as top_p is."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the tokens stay as sampled, the text is cut before the string."""

    def check(self) -> None:
        _at_least(self, max_tokens=1, temperature=0.0, top_k=0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} is not in (0, 1]")

    def check_training(self, where: str) -> None:
        """Refuse what would make the sampled distribution another than the policy's."""
        if self.temperature == 0:
            raise UserError(f"{where}: temperature = 0 is greedy, so a group's completions are all the same; use 1.0")
        if self.top_p < 1 or self.top_k:
            raise UserError(
                f"{where}: top_p / top_k below the full distribution bias the policy gradient; "
                "leave top_p = 1.0 and top_k = 0 (they are free in `gold_sampling` and in `truecourse sample`)"
            )


@dataclass(frozen=True, kw_only=True)
class RewardPart:
    """One scored part of a reward, or of the gold."""

    use: str
    """A verifier by name (`exact`, `number`, `regex`, `math`), a shaping part by name (`length`, `overlong`), or your
    own function as `package.module:function` or `file.py:function`."""
    name: str = ""
    """Name in records and report; the last part of `use` by default."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments: of a built-in part, such as `pattern` for `regex` or `answer` (the column) for `exact`, or of
    your own function or class."""
    timeout: float = 60.0
    """Seconds that one call may take before its samples are marked as failed."""

    @property
    def label(self) -> str:
        return self.name or self.use.rpartition(":")[2]

    def check(self) -> None:
        if self.timeout <= 0:
            raise UserError(f"reward {self.label!r}: timeout = {self.timeout} must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has, whatever its method."""

    method: ClassVar[str]

    data: str | tuple[str, ...] = ""
    """Training rows: a .jsonl, .parquet or .csv file (or several), a hub id, or `lab:NAME` for a built-in task."""
    held_out: str | int | float = 0.1
    """Rows the gold is measured on: a source like `data`, a share (0–1), or a count taken from `data`. Rows with the
    same prompt always fall on the same side."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename, new name first: `{ prompt = "question" }`."""
    chat: bool = False
    """Wrap plain-text prompts as a user's chat message."""
    system: str = ""
    """System message put before chat prompts that have none."""
    steps: int = 100
    """Optimiser steps."""
    lr: float = 1e-6
    """Peak learning rate of AdamW. RL on full weights: 1e-6..5e-6; about 10× with LoRA."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0; 5–10 % is common."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up; cosine and linear end at 10 % of the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per step, as a share of lr."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 is off."""
    micro_tokens: int = 0
    """Most tokens (prompts once per group, plus completions) of one forward; bounds memory, never changes gradients.
    0 is 2,048 on a CPU, where more is slower and takes memory, and 16,384 on a GPU."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 follows `gold_every`. One is always written at the end and on Ctrl-C."""
    gold: tuple[RewardPart, ...] = ()
    """The second measure, on held-out prompts, never trained on."""
    gold_every: int = 25
    """Steps between gold measurements (also at step 0 and at the end)."""
    gold_prompts: int = 256
    """Most held-out prompts that one gold measurement uses; always the same ones."""
    gold_sampling: Sampling | None = None
    """How gold completions are drawn; by default greedy, so that two measurements of one model agree, with the
    training sampling's max_tokens and stop strings."""
    stop_at: float = 0.0
    """End the stage early once the first gold measure reaches this value; 0 is off."""

    def check(self) -> None:
        where = f"stage {self.method!r}"
        if not self.data:
            raise UserError(f"{where}: `data` is missing; name a .jsonl, .parquet or .csv file, a hub id, or lab:NAME")
        _at_least(self, steps=1, lr=0.0, warmup=0.0, weight_decay=0.0, max_grad_norm=0.0, micro_tokens=0)
        _at_least(self, checkpoint_every=0, gold_every=1, gold_prompts=1, stop_at=0.0)
        if self.warmup > 1:
            raise UserError(f"{where}: warmup = {self.warmup} is a share of the steps, between 0 and 1")
        if isinstance(self.held_out, int | float) and self.held_out < 0:
            raise UserError(f"{where}: held_out = {self.held_out} is negative; give a share, a count or a file")
        if self.gold_sampling:
            self.gold_sampling.check()
        _unique([p.label for p in self.gold], f"{where}: gold")
        for part in self.gold:
            part.check()


@dataclass(frozen=True, kw_only=True)
class Sft(Stage):
    """Supervised fine-tuning: the likelihood of demonstrations."""

    method: ClassVar[str] = "sft"

    batch_size: int = 32
    """Demonstrations per optimiser step."""
    lr: float = 2e-5
    """Peak learning rate. Full weights: 1e-5..5e-5; about 10× with LoRA."""
    max_length: int = 0
    """Longest demonstration in tokens, prompt and completion; longer ones are refused by row. 0 is the model's
    context."""

    def check(self) -> None:
        super().check()
        _at_least(self, batch_size=1, max_length=0)


@dataclass(frozen=True, kw_only=True)
class Grpo(Stage):
    """Group relative policy optimisation and its variants: the group's own statistics as the baseline."""

    method: ClassVar[str] = "grpo"

    rewards: tuple[RewardPart, ...] = ()
    """What is maximised: the weighted sum of these parts."""
    sampling: Sampling = field(default_factory=Sampling)
    """How training completions are drawn."""
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"] = "grpo"
    """Which row of the table in methods/grpo.py fills the settings below that you leave out."""
    prompts_per_step: int = 16
    """Prompts of one rollout."""
    group_size: int = 8
    """Completions of each prompt; 8 or more, so that a group's mean is a baseline worth having."""
    updates_per_rollout: int = 1
    """Optimiser steps on each rollout, each on its own share of the prompts (several passes: see `epochs`)."""
    epochs: int = 1
    """Passes over each rollout."""
    beta: float | None = None
    """Weight of KL(policy ‖ reference) in J, in reward units per nat; 0 leaves it measured only."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where beta acts: as a loss term, or subtracted from the reward per sequence."""
    kl_loss: Literal["k1", "k2", "k3"] | None = None
    """Estimator in the loss. k2 has the exact on-policy gradient of the reverse KL; the GRPO paper's is k3."""
    kl_every: int = 1
    """Steps between measurements of kl/ref where beta is 0 (each costs one forward of the reference)."""
    baseline: Literal["mean", "leave_one_out", "none"] | None = None
    """What is subtracted from a reward: its group's mean, the mean of the group's others (RLOO), or nothing."""
    scale: Literal["sample", "population", "batch", "none"] | None = None
    """What an advantage is divided by: the group's std (n − 1 or n), the whole batch's, or nothing."""
    ratio: Literal["token", "sequence"] | None = None
    """Importance ratio per token, or per sequence as its geometric mean (GSPO)."""
    loss: Literal["clip", "cispo", "reinforce"] | None = None
    """Surrogate: PPO's clipped ratio, CISPO's clipped and detached weight, or plain log-prob times advantage."""
    clip_low: float | None = None
    """Lower clip range of the ratio: it is kept above 1 − clip_low."""
    clip_high: float | None = None
    """Upper clip range: the ratio is kept below 1 + clip_high; larger than clip_low is DAPO's clip-higher."""
    aggregate: Literal["token", "sequence", "constant"] | None = None
    """Mean over the batch's tokens, over sequences of their token means (GRPO paper), or sum over tokens divided by
    completions × max_tokens (Dr. GRPO)."""
    dynamic_sampling: bool | None = None
    """Sample further prompts in place of groups whose rewards all agree (DAPO, §3.2)."""
    max_resamples: int = 4
    """With dynamic sampling: most extra rounds before the step goes on with the groups it has."""
    overlong_tokens: int | None = None
    """Soft punishment for length (DAPO, eq. 13): the reward falls linearly by up to 1 over the last this many tokens
    before max_tokens; 0 is off."""
    mask_truncated: bool = False
    """Leave completions that hit max_tokens out of the loss (DAPO's overlong filtering)."""
    entropy_bonus: float = 0.0
    """Weight of the policy's per-token entropy added to J."""
    is_cap: float = 2.0
    """Cap of the truncated importance weights between sampler and trainer; for engines other than the local one."""
    reference: Literal["auto", "copy", "adapter_off", "offload"] = "auto"
    """How the reference is kept: a frozen copy, the adapter switched off (auto with LoRA), or a copy that leaves the
    GPU while gradients are computed."""
    reference_every: int = 0
    """Steps between moves of the reference toward the policy; 0 keeps it fixed."""
    reference_mix: float = 1.0
    """Share of the policy in a moved reference (TR-DPO's alpha): 1 replaces it."""
    max_reward_failures: float = 0.1
    """Share of a rollout's scores that may fail before the run stops with the first traceback."""

    def check(self) -> None:
        super().check()
        where = "stage 'grpo'"
        if not self.rewards:
            raise UserError(
                f'{where}: `rewards` is empty; add a [[stage.rewards]] table with `use = "exact"` or your own function'
            )
        self.sampling.check()
        self.sampling.check_training(where)
        for part in self.rewards:
            part.check()
        _unique([p.label for p in self.rewards], f"{where}: rewards")
        _at_least(self, prompts_per_step=1, group_size=2, updates_per_rollout=1, epochs=1, kl_every=1, beta=0.0)
        _at_least(self, clip_low=0.0, clip_high=0.0, max_resamples=1, overlong_tokens=0, entropy_bonus=0.0, is_cap=1.0)
        _at_least(self, reference_every=0)
        if self.prompts_per_step % self.updates_per_rollout:
            raise UserError(
                f"{where}: prompts_per_step = {self.prompts_per_step} does not divide into "
                f"updates_per_rollout = {self.updates_per_rollout} equal shares"
            )
        if not 0 < self.reference_mix <= 1:
            raise UserError(f"{where}: reference_mix = {self.reference_mix} is not in (0, 1]")
        if self.reference_mix < 1 and not self.reference_every:
            raise UserError(
                f"{where}: reference_mix = {self.reference_mix} does nothing while reference_every = 0; set how often "
                "the reference moves, or leave it out"
            )
        if self.reference_every and self.reference == "adapter_off":
            raise UserError(
                f"{where}: a moving reference (reference_every) cannot be the adapter switched off; "
                'use reference = "copy"'
            )
        if not 0 <= self.max_reward_failures < 1:
            raise UserError(f"{where}: max_reward_failures = {self.max_reward_failures} is a share in [0, 1)")
        if (self.overlong_tokens or 0) > self.sampling.max_tokens:
            raise UserError(
                f"{where}: overlong_tokens = {self.overlong_tokens} exceeds max_tokens = {self.sampling.max_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class Dpo(Stage):
    """Direct preference optimisation and its variants: Bradley–Terry with the policy's own implicit reward."""

    method: ClassVar[str] = "dpo"

    batch_size: int = 32
    """Pairs per optimiser step; 32–128 are common."""
    lr: float = 5e-7
    """Peak learning rate. Full weights: 1e-7..5e-7; about 10× with LoRA."""
    variant: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "dpo_norm", "simpo"] = "dpo"
    """Which row of the table in methods/dpo.py fills the settings below that you leave out."""
    beta: float | None = None
    """Reward per nat of log-ratio: the weight of the KL in J. 0.01–0.2 where log-probs are summed, 2–10 where they are
    averaged over tokens."""
    loss: Literal["sigmoid", "square", "hinge"] | None = None
    """What is taken of a pair's margin: Bradley–Terry, IPO's square, or SLiC's hinge."""
    length: Literal["sum", "mean"] | None = None
    """Log-prob of an answer: the sum over its tokens, or their mean."""
    target_margin: float | None = None
    """Margin that a pair should reach beyond zero, in reward units (SimPO's gamma)."""
    label_smoothing: float | None = None
    """Share of the choices that you believe to be flipped, in [0, 0.5)."""
    robust: bool | None = None
    """With label_smoothing: the loss that is unbiased under such flips, in place of the conservative one."""
    reference: Literal["auto", "copy", "adapter_off", "offload", "stored", "none"] | None = None
    """How the reference is kept: a frozen copy, the adapter switched off (auto with LoRA), a copy that leaves the GPU
    while gradients are computed, log-probs stored before the first step (no second model in memory), or none."""
    max_length: int = 0
    """Longest prompt and answer together in tokens. 0 is the model's context."""
    prompt_end: str = ""
    """In pairs of whole texts without a prompt: what the prompt ends in, such as "\\n\\nAssistant:"; its last place
    counts. Without it, all that both texts begin with is the prompt."""
    bad_pairs: Literal["refuse", "skip"] = "refuse"
    """What happens to pairs that are identical, empty, lack a side or do not share their prompt; both list them."""
    long_pairs: Literal["refuse", "skip"] = "refuse"
    """What happens to pairs longer than max_length; both list them."""

    def check(self) -> None:
        super().check()
        where = "stage 'dpo'"
        _at_least(self, batch_size=1, max_length=0, beta=0.0, target_margin=0.0, label_smoothing=0.0)
        if self.beta == 0:
            raise UserError(f"{where}: beta = 0 makes every reward 0; 0.1 is the usual start")
        if self.label_smoothing is not None and not self.label_smoothing < 0.5:
            raise UserError(
                f"{where}: label_smoothing = {self.label_smoothing} must be below 0.5, where choices say nothing"
            )


STAGES: dict[str, type[Stage]] = {cls.method: cls for cls in (Sft, Grpo, Dpo)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: the model it starts from, and the stages it goes through."""

    model: str = "tiny"
    """Where the policy starts: `tiny` (the shipped model), a Hugging Face folder, a hub id, a .gguf file, or a run."""
    out: str = "runs/run"
    """The run directory; it must not exist yet."""
    seed: int = 0
    """Every random stream is derived from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a CUDA GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights in memory: auto is float32 on CPU and bfloat16 with a float32 master copy on a GPU."""
    threads: int = 1
    """CPU threads for torch; the bits of a result depend on it. With 2, spinning made a busy 2-core machine 4.5–10×
    slower."""
    chat_template: str = ""
    """A Jinja file that replaces the tokenizer's chat template."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where the records are sent as well as to the run directory."""
    lora: Lora | None = None
    """Train adapters in place of all weights."""
    stage: tuple[Stage, ...] = ()
    """The stages, in order; each starts from the last one's result."""

    def check(self) -> Recipe:
        """Raise `UserError` on what contradicts itself; returns self."""
        if not self.stage:
            raise UserError('the recipe has no [[stage]]; add one with `method = "grpo"` or `method = "sft"`')
        _at_least(self, threads=1, seed=0)
        if self.lora:
            self.lora.check()
        for stage in self.stage:
            stage.check()
            if self.lora and getattr(stage, "reference", "auto") == "auto" and getattr(stage, "reference_every", 0):
                raise UserError('a moving reference (reference_every) with LoRA needs reference = "copy"')
            if not self.lora and getattr(stage, "reference", "auto") == "adapter_off":
                raise UserError('reference = "adapter_off" needs a [lora] table; without adapters use "copy"')
        return self


# -- reading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, checked. `overrides` are `key=value` strings, as after `--set`.

    A key is dotted (`stage.0.lr`); a bare one (`lr`) is looked up in the recipe, then in its only stage.
    Raises `UserError` for a missing file, bad TOML, an unknown key (naming the nearest), a wrong type, a contradiction.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {str(path)!r} does not exist; `truecourse init` writes one to start from")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} is not valid TOML: {error}") from None
    for override in overrides:
        _override(table, override)
    return from_table(table)


def from_table(table: dict[str, Any]) -> Recipe:
    """The recipe in a plain table (parsed TOML or JSON), checked."""
    table = dict(table)
    stages = table.pop("stage", [])
    if not isinstance(stages, list) or not all(isinstance(row, dict) for row in stages):
        raise UserError("`stage` must be a list of tables: write [[stage]] with double brackets")
    return dataclasses.replace(
        _convert(table, Recipe, "recipe"), stage=tuple(_stage(row, i) for i, row in enumerate(stages))
    ).check()


def to_table(config: Any) -> dict[str, Any]:
    """A config as a plain table that TOML can hold; `from_table` gives the same recipe back. None is left out."""
    table: dict[str, Any] = {"method": config.method} if isinstance(config, Stage) else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_table(value)
        elif isinstance(value, tuple):
            value = [to_table(v) if dataclasses.is_dataclass(v) else v for v in value]
        if value is not None:
            table[f.name] = value
    return table


def _stage(row: dict[str, Any], index: int) -> Stage:
    row = dict(row)
    method = row.pop("method", None)
    if method not in STAGES:
        hint = _nearest(str(method), STAGES)
        raise UserError(f"stage {index}: method = {method!r} is not one of {', '.join(STAGES)}{hint}")
    return _convert(row, STAGES[method], f"stage {index} ({method})")


def _convert(table: dict[str, Any], cls: type, where: str) -> Any:
    _refuse_unknown(table, cls, where)
    try:
        return msgspec.convert(table, cls)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {str(error).replace('- at `$.', '- in `').replace('`$', '`')}") from None


def _refuse_unknown(table: dict[str, Any], cls: type, where: str) -> None:
    """msgspec ignores unknown keys of a dataclass; here they are errors, at every depth."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(key, known)}")
        nested = next((t for t in _flatten(hints[key]) if dataclasses.is_dataclass(t)), None)
        for row in value if isinstance(value, list) else [value]:
            if nested and isinstance(row, dict):
                _refuse_unknown(row, typing.cast(type, nested), f"{where}.{key}")


def _flatten(hint: Any) -> list[Any]:
    """The plain types inside `A | None`, `tuple[A, ...]` and the like."""
    args = typing.get_args(hint)
    return [hint] if not args or typing.get_origin(hint) is Literal else [t for arg in args for t in _flatten(arg)]


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid here: {', '.join(sorted(known))}"


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {text!r} is not key=value, for example --set stage.0.lr=1e-5")
    try:
        value = tomllib.loads(f"x = {raw.strip()}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    path = key.split(".")
    if path[0] not in {f.name for f in dataclasses.fields(Recipe)}:
        if len(table.get("stage", [])) != 1:
            raise UserError(f"--set {key}: say which stage, for example --set stage.0.{key}={raw}")
        path = ["stage", "0", *path]
    node: Any = table
    for i, part in enumerate(path):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--set {key}: {'.'.join(path[:i])} has {len(node)} entries, counted from 0; "
                    f"{part!r} is none of them"
                )
            part = int(part)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            raise UserError(f"--set {key}: {'.'.join(path[:i])} is a value, not a table")
        if i == len(path) - 1:
            node[part] = value
        else:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]


# -- the docstrings of fields ----------------------------------------------------------------------------------------


def field_docs(cls: type) -> dict[str, str]:
    """{field: its docstring on one line}, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return docs


# -- small checks ----------------------------------------------------------------------------------------------------


def _at_least(config: Any, **limits: float) -> None:
    for key, limit in limits.items():
        value = getattr(config, key)
        if value is not None and not value >= limit:  # `not >=` also refuses NaN
            raise UserError(f"{key} = {value} must be at least {limit:g}")
        if value == math.inf:
            raise UserError(f"{key} = {value} must be a finite number")


def _unique(names: list[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two parts are called {name!r}; give one of them another `name`")
