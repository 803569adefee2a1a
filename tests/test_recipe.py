"""The recipe: read, checked, written back whole, documented, and the same once resolved."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from truecourse import recipe as recipes
from truecourse import starter
from truecourse.errors import UserError
from truecourse.methods import grpo
from truecourse.recipe import STAGES, Dpo, Grpo, Lora, Recipe, RewardPart, Sampling, Sft, Stage, field_docs
from truecourse.trainer import resolve

CONFIGS = (Recipe, Lora, Sampling, RewardPart, Stage, Sft, Grpo, Dpo)
FULL = Recipe(
    model="some/model",
    seed=3,
    threads=2,
    lora=Lora(rank=4, targets=("q_proj", "v_proj")),
    stage=(
        Sft(data="demos.jsonl", held_out=3, gold=(RewardPart(use="exact", name="right"),), max_length=100),
        Grpo(
            data=("a.jsonl", "b.jsonl"),
            held_out="held.jsonl",
            columns={"prompt": "question"},
            variant="dapo",
            beta=0.02,
            kl_in="reward",
            sampling=Sampling(max_tokens=64, stop=("\n\n", '"quoted"')),
            rewards=(
                RewardPart(use="regex", args={"pattern": 'a "b" \\d+\n', "fullmatch": True}),
                RewardPart(use="mine.py:f", weight=-0.5, timeout=3.0),
            ),
            gold=(RewardPart(use="math"),),
            gold_sampling=Sampling(temperature=0.5, top_p=0.9, top_k=20),
        ),
    ),
).check()


def write(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", [FULL, Recipe(stage=(Sft(data="x.jsonl"),)), resolve(FULL)])
def test_a_recipe_comes_back_from_toml(recipe: Recipe, tmp_path: Path) -> None:
    assert recipes.load(write(tmp_path / "r.toml", recipes.to_table(recipe))) == recipe


def test_what_toml_leaves_out_is_the_default(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", {"stage": [{"method": "sft", "data": "x.jsonl"}]})
    assert recipes.load(path) == Recipe(stage=(Sft(data="x.jsonl"),))
    table = {"lr": 1, "held_out": 1, "method": "sft", "data": "x.jsonl"}  # an integer where a float is meant
    loaded = recipes.load(write(path, {"stage": [table]})).stage[0]
    assert loaded.lr == 1.0 and loaded.held_out == 1 and isinstance(loaded.held_out, int)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_says_what_it_is(cls: type) -> None:
    docs = field_docs(cls)
    for f in dataclasses.fields(cls):
        assert len(docs.get(f.name, "")) > 15 and docs[f.name].rstrip().endswith((".", ")")), f"{cls.__name__}.{f.name}"
    assert set(docs) == {f.name for f in dataclasses.fields(cls)}


def test_every_config_class_is_among_those_checked() -> None:
    found = {c for c in vars(recipes).values() if isinstance(c, type) and dataclasses.is_dataclass(c)}
    assert found == set(CONFIGS)


def paths(recipe: Recipe) -> list[tuple[str, ...]]:
    """Every place in the table of a recipe where a key can be misspelt."""
    found: list[tuple[str, ...]] = []

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, dict) and path[-1:] not in (("args",), ("columns",)):
            found.append(path)
            for key, value in node.items():
                walk(value, (*path, key))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, (*path, str(i)))

    walk(recipes.to_table(recipe), ())
    return found


@pytest.mark.parametrize("path", paths(FULL), ids=".".join)
def test_an_unknown_key_is_refused_wherever_it_stands(path: tuple[str, ...]) -> None:
    table = node = recipes.to_table(FULL)
    for key in path:
        node = node[int(key)] if isinstance(node, list) else node[key]
    known = next(key for key in node if key != "method")
    node[known + "x"] = node[known]
    with pytest.raises(UserError, match=f"unknown key '{known}x'; did you mean '{known}'"):
        recipes.from_table(table)
    del node[known + "x"]
    node["zzzzzz"] = 1
    with pytest.raises(UserError, match="unknown key 'zzzzzz'; valid here: "):
        recipes.from_table(table)
    del node["zzzzzz"]
    assert recipes.from_table(table) == FULL


def test_every_setting_can_be_written_and_read() -> None:
    """No field is of a type that TOML or the reader cannot take."""
    for cls in (Sft, Grpo):
        stage = recipes.to_table(FULL.stage[0 if cls is Sft else 1])
        missing = {f.name for f in dataclasses.fields(cls)} - set(stage)
        assert missing <= {n for n, hint in typing.get_type_hints(cls).items() if type(None) in typing.get_args(hint)}


# -- --set ------------------------------------------------------------------------------------------------------------

SETS: list[tuple[str, Any]] = [
    ("stage.0.lr=1e-3", lambda r: r.stage[0].lr == 1e-3),
    ("lr = 1e-3", lambda r: r.stage[0].lr == 1e-3),
    ("model=other/model", lambda r: r.model == "other/model"),
    ('model="a b"', lambda r: r.model == "a b"),
    ("out=runs/x=y", lambda r: r.out == "runs/x=y"),
    ("sampling.max_tokens=7", lambda r: r.stage[0].sampling.max_tokens == 7),
    ('sampling.stop=["x", "y"]', lambda r: r.stage[0].sampling.stop == ("x", "y")),
    ("rewards.0.weight=-2", lambda r: r.stage[0].rewards[0].weight == -2),
    ('rewards.0.args.pattern="x+"', lambda r: r.stage[0].rewards[0].args == {"pattern": "x+"}),
    ("lora.rank=2", lambda r: r.lora.rank == 2),
    ("chat=true", lambda r: r.stage[0].chat is True),
    ('columns={prompt="q"}', lambda r: r.stage[0].columns == {"prompt": "q"}),
]


@pytest.mark.parametrize(("text", "holds"), SETS, ids=[s[0] for s in SETS])
def test_set_changes_one_key(text: str, holds: Any, tmp_path: Path) -> None:
    stage = {"method": "grpo", "data": "x.jsonl", "rewards": [{"use": "exact"}]}
    assert holds(recipes.load(write(tmp_path / "r.toml", {"stage": [stage]}), [text]))


def test_later_sets_win_and_a_bare_key_needs_one_stage(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", recipes.to_table(FULL))
    assert recipes.load(path, ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(UserError, match=r"say which stage, for example --set stage\.0\.lr=1"):
        recipes.load(path, ["lr=1"])


# -- resolving --------------------------------------------------------------------------------------------------------


def stages() -> list[Grpo]:
    part = (RewardPart(use="exact"),)
    own: list[dict[str, Any]] = [
        {}, {"beta": 0.1}, {"beta": 0.1, "kl_in": "loss", "kl_loss": "k3"}, {"scale": "none", "aggregate": "constant"},
        {"clip_high": 0.5, "loss": "clip"}, {"overlong_tokens": 3}, {"dynamic_sampling": True, "max_resamples": 2},
    ]  # fmt: skip
    return [Grpo(data="lab:sums", rewards=part, variant=v, **o) for v in grpo.VARIANTS for o in own]  # type: ignore[arg-type]


def test_resolving_fills_every_setting_once() -> None:
    for stage in stages():
        full = grpo.resolve(stage)
        assert grpo.resolve(full) == full
        for f in dataclasses.fields(grpo.Variant):
            asked, got = getattr(stage, f.name), getattr(full, f.name)
            row = getattr(grpo.VARIANTS[stage.variant], f.name)
            expected = asked if asked is not None else row if row is not None else stage.sampling.max_tokens // 5
            assert got is not None and got == expected


def test_a_resolved_recipe_stays_itself_and_means_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "held.jsonl", "mine.py"):
        Path(name).write_text("")
    full = resolve(FULL)
    stage = full.stage[1]
    assert isinstance(stage, Grpo)
    assert stage.data == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert stage.held_out == str(tmp_path / "held.jsonl")
    assert stage.rewards[1].use == f"{tmp_path / 'mine.py'}:f" and stage.rewards[1].label == "f"
    assert full.model == "some/model", "a hub id stays one"
    assert full.stage[0].gold_sampling == Sampling(temperature=0.0)
    monkeypatch.chdir("/")
    assert resolve(full) == full
    again = recipes.load(write(tmp_path / "r.toml", recipes.to_table(full)))
    assert again == full and resolve(again) == full


def test_gold_is_greedy_with_the_trainings_length_unless_said() -> None:
    part = (RewardPart(use="exact"),)
    stage = Grpo(data="lab:sums", rewards=part, sampling=Sampling(max_tokens=9, stop=("!",), temperature=0.7))
    (got,) = resolve(Recipe(stage=(stage,))).stage
    assert got.gold_sampling == Sampling(max_tokens=9, stop=("!",), temperature=0.0)


# -- init -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_key", [False, True])
@pytest.mark.parametrize("method", STAGES)
def test_init_writes_a_recipe_that_loads(method: str, every_key: bool, tmp_path: Path) -> None:
    starter.write(tmp_path / "r.toml", method, every_key)
    text = (tmp_path / "r.toml").read_text(encoding="utf-8")
    recipe = recipes.load(tmp_path / "r.toml")
    assert [stage.method for stage in recipe.stage] == [method]
    assert recipe.stage[0] == starter.EXAMPLES[method]
    assert resolve(recipe)
    if every_key:
        for f in (*dataclasses.fields(STAGES[method]), *dataclasses.fields(Recipe)):
            if f.name not in (*starter.TABLES, "stage", "lora"):
                assert f"\n{f.name} = " in text or f"\n# {f.name} =" in text, f.name
    assert max(map(len, text.splitlines())) <= 120


def test_every_method_has_a_starter() -> None:
    assert set(starter.EXAMPLES) == set(STAGES)
