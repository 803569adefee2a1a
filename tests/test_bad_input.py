"""What is wrong with the input is said in one message that names the thing and the fix, and leaves nothing behind."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from truecourse import cli

GRPO: dict[str, Any] = {
    "method": "grpo",
    "data": "data.jsonl",
    "held_out": 4,
    "steps": 2,
    "prompts_per_step": 2,
    "group_size": 2,
    "sampling": {"max_tokens": 4},
    "rewards": [{"use": "exact"}],
    "gold": [{"use": "exact"}],
}
SFT: dict[str, Any] = {"method": "sft", "data": "demos.jsonl", "held_out": 4, "steps": 2, "batch_size": 2}
ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(16)]
DEMOS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(16)]
REWARDS = """
import time

def raises(completion):
    raise KeyError("price list")

def nan(completion):
    return float("nan")

def one_too_few(completions):
    return [0.0] * (len(completions) - 1)

def hangs(completion):
    time.sleep(30)

def text(completion):
    return "good"

def nothing(completion):
    return None

def needs(completion, price):
    return 0.0

def shapeless(a, b):
    return 0.0

def raises_late(completion, seen=[]):
    seen.append(1)
    if len(seen) > 6:
        raise KeyError("price list")
    return float(len(seen) % 2)
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from truecourse.lab.tiny import save_new

    folder = tmp_path_factory.mktemp("models") / "random"
    save_new(folder, 0)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.py").write_text("def score(completion):\n    return (1\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1="}\n\n{"prompt": "1+2=", answer: 3}\n')
    return tmp_path


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    def refused(*args: str, code: int = 2) -> str:
        """The one line that the command says, exiting with `code`, and leaving the folder as it was."""
        before = sorted(folder.rglob("*"))
        capsys.readouterr()
        assert cli.main(list(args)) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not re.match(r"step +\d+/|warning: ", line)]
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
        assert not out
        assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)] == before
        return lines[0]

    return refused


@pytest.fixture
def train(refused: Refused, folder: Path, model: Path) -> Refused:
    def train(stage: dict[str, Any], *sets: str, code: int = 2, top: dict[str, Any] | None = None) -> str:
        """What `train` says of a recipe with this stage, these other keys and these `--set`s."""
        table = {"model": str(model), "out": "run"} | (top or {}) | {"stage": [stage]}
        (folder / "recipe.toml").write_text(tomli_w.dumps(table))
        return refused(
            "train", "recipe.toml", "--quiet", *(word for text in sets for word in ("--set", text)), code=code
        )

    return train


def changed(stage: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The stage with `value` at a dotted path; a list is entered at its first entry."""
    stage = node = copy.deepcopy(stage)
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
        node = node[0] if isinstance(node, list) else node
    node[last] = value
    return stage


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = [
    (GRPO, "data", "date.jsonl", "'date.jsonl' does not exist in .*; did you mean 'data.jsonl'?"),
    (GRPO, "data", "empty.jsonl", "empty.jsonl' has no rows"),
    (GRPO, "data", "bad.jsonl", "bad.jsonl:3: not valid JSON: .* at column 20"),
    (GRPO, "data", "mine.py", "files are read as .jsonl"),
    (GRPO, "data", "lab:sum", "'lab:sum' is not a built-in task; .*did you mean 'lab:sums'"),
    (GRPO, "data", "", "`data` is missing"),
    (GRPO, "held_out", "nowhere.jsonl", "'nowhere.jsonl' does not exist"),
    (GRPO, "held_out", 0, "a gold needs held-out prompts; set held_out"),
    (GRPO, "held_out", 16, "held_out = 16 of 16 rows .* leaves nothing to train on"),
    (GRPO, "held_out", -1, "held_out = -1 is negative"),
    (GRPO, "columns", {"prompt": "question"}, "columns.prompt = 'question', but the row has the columns prompt"),
    (SFT, "data", "data.jsonl", "data.jsonl:1 has the columns .*; sft needs .*rename `answer` to `completion`"),
    (GRPO, "step", 5, "stage 0 .grpo.: unknown key 'step'; did you mean 'steps'?"),
    (GRPO, "sampling.max_token", 5, "unknown key 'max_token'; did you mean 'max_tokens'?"),
    (GRPO, "rewards.wieght", 5.0, "unknown key 'wieght'; did you mean 'weight'?"),
    (GRPO, "method", "gpro", "method = 'gpro' is not one of sft, grpo, dpo; did you mean 'grpo'?"),
    (GRPO, "steps", "many", "stage 0 .grpo.: Expected `int`, got `str` - in `steps`"),
    (GRPO, "sampling.temperature", "hot", "Expected `float`, got `str` - in `sampling.temperature`"),
    (GRPO, "variant", "dapoo", "Invalid enum value 'dapoo' - in `variant`"),
    (GRPO, "lr", -1e-5, "lr = -1e-05 must be at least 0"),
    (GRPO, "lr", float("nan"), "lr = nan must be at least 0"),
    (GRPO, "lr", float("inf"), "lr = inf must be a finite number"),
    (GRPO, "group_size", 1, "group_size = 1 must be at least 2"),
    (GRPO, "steps", 0, "steps = 0 must be at least 1"),
    (GRPO, "warmup", 5.0, "warmup = 5.0 is a share of the steps, between 0 and 1"),
    (GRPO, "updates_per_rollout", 3, "prompts_per_step = 2 does not divide into updates_per_rollout = 3"),
    (GRPO, "reference", "adapter_off", 'reference = "adapter_off" needs a .lora. table'),
    (GRPO, "baseline", "none", 'baseline = "none" with scale = "sample" divides by'),
    (GRPO, "overlong_tokens", 9, "overlong_tokens = 9 exceeds max_tokens = 4"),
    (GRPO, "kl_in", "reward", 'kl_in = "reward" does nothing while beta = 0'),
    (GRPO, "kl_loss", "k3", 'kl_loss = "k3" does nothing while beta = 0'),
    (GRPO, "reference_mix", 0.5, "reference_mix = 0.5 does nothing while reference_every = 0"),
    (GRPO, "max_resamples", 2, "max_resamples = 2 does nothing without dynamic_sampling"),
    (GRPO | {"variant": "rloo"}, "clip_high", 0.3, 'clip_high = 0.3 does nothing with loss = "reinforce"'),
    (GRPO | {"variant": "rloo"}, "kl_loss", "k3", 'kl_loss = "k3" does nothing with kl_in = "reward"'),
    (GRPO, "sampling.temperature", 0.0, "temperature = 0 is greedy"),
    (GRPO, "sampling.top_p", 0.9, "top_p / top_k below the full distribution bias the policy gradient"),
    (GRPO, "rewards", [], "`rewards` is empty"),
    (GRPO, "rewards", [{"use": "exact"}, {"use": "exact"}], "two parts are called 'exact'"),
    (GRPO, "prompts_per_step", 13, "prompts_per_step = 13, but there are only 12 training prompts; lower it"),
    (GRPO, "sampling.max_tokens", 600, "max_tokens = 600 leaves no room for a prompt in the model's context of 512"),
    (GRPO, "chat", "yes", "Expected `bool`, got `str` - in `chat`"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "path", "value", "message"), RECIPES, ids=[f"{r[1]}={r[2]}"[:40] for r in RECIPES])
def test_a_recipe_that_cannot_run_is_refused(
    stage: dict[str, Any], path: str, value: Any, message: str, train: Refused
) -> None:
    assert re.search(
        message.replace("?", r"\?").replace("(", r"\(").replace("[", r"\["), train(changed(stage, path, value))
    )


TOP = [
    ({"modle": "tiny"}, "recipe: unknown key 'modle'; did you mean 'model'?"),
    ({"lora": {"rnak": 8}}, "recipe.lora: unknown key 'rnak'; did you mean 'rank'?"),
    ({"lora": {"targets": ["q_prj"]}}, "lora.targets = ('q_prj',): Target modules"),
    ({"lora": {"quantize": "4bit"}}, 'lora.quantize = "4bit" needs'),
    ({"threads": 0}, "threads = 0 must be at least 1"),
    ({"seed": -1}, "seed = -1 must be at least 0"),
    ({"model": "models/none"}, "model 'models/none'"),
    ({"model": "./none"}, "model './none' does not exist; give a Hugging Face folder"),
    ({"model": "none.gguf"}, "model 'none.gguf' does not exist"),
    ({"chat_template": "none.jinja"}, "chat_template = 'none.jinja' does not exist"),
    ({"tracker": "wandb"}, "tracker = 'wandb' needs a package: pip install 'truecourse[wandb]'"),
    ({"tracker": "wandbb"}, "Invalid enum value 'wandbb' - in `tracker`"),
    ({"device": "cuda"}, 'device = "cuda", but torch sees no CUDA GPU'),
]


@pytest.mark.parametrize(("top", "message"), TOP, ids=[str(t[0]) for t in TOP])
def test_a_run_that_cannot_start_is_refused(top: dict[str, Any], message: str, train: Refused) -> None:
    if top.get("tracker") == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    if ("quantize" in str(top) or "device" in top) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in train(GRPO, top=top)


SETS = [
    ("lr", "--set 'lr' is not key=value"),
    ("=3", "--set '=3' is not key=value"),
    ("stage.0.lrr=3", "unknown key 'lrr'; did you mean 'lr'?"),
    ("stage.3.lr=3", "--set stage.3.lr: stage has 1 entries, counted from 0; '3' is none of them"),
    ("stage.0.steps.x=3", "--set stage.0.steps.x: stage.0.steps is a value, not a table"),
    ("steps=lots", "Expected `int`, got `str` - in `steps`"),
    ("modle=tiny", "unknown key 'modle'"),
]


@pytest.mark.parametrize(("text", "message"), SETS)
def test_a_set_that_means_nothing_is_refused(text: str, message: str, train: Refused) -> None:
    assert message in train(GRPO, text)


def test_a_recipe_that_cannot_be_read_is_refused(refused: Refused, folder: Path) -> None:
    assert "recipe 'none.toml' does not exist; `truecourse init` writes one" in refused("train", "none.toml")
    (folder / "a.toml").write_text("model = \n")
    assert re.search(r"recipe 'a.toml' is not valid TOML: .*line 1", refused("train", "a.toml"))
    (folder / "a.toml").write_bytes(b"model = '\xff'\n")
    assert "recipe 'a.toml' is not valid TOML" in refused("train", "a.toml")
    (folder / "a.toml").write_text('model = "tiny"\n')
    assert "the recipe has no [[stage]]" in refused("train", "a.toml")
    (folder / "a.toml").write_text('stage = "grpo"\n')
    assert "[[stage]]" in refused("train", "a.toml")
    (folder / "a.toml").write_text('stage = ["grpo"]\n')
    assert "[[stage]]" in refused("train", "a.toml")
    assert "recipe '.' does not exist" in refused("train", ".")


def test_an_output_in_use_is_refused(train: Refused, folder: Path) -> None:
    (folder / "used").mkdir()
    (folder / "used" / "thesis.tex").write_text("x")
    assert "'used' is not empty (it holds 'thesis.tex')" in train(GRPO, top={"out": "used"})
    assert "cannot be used: Not a directory" in train(GRPO, top={"out": "data.jsonl"})
    (folder / "old").mkdir()
    (folder / "old" / "recipe.toml").write_text("")
    message = train(GRPO, top={"out": "old"})
    assert "'old' already holds a run: continue it with `truecourse resume old`" in message and "--set out=" in message


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_pickle_is_never_loaded(train: Refused, refused: Refused, folder: Path, model: Path) -> None:
    shutil.copytree(model, folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    message = train(GRPO, top={"model": "pickled"})
    assert "holds only pickled weights (pytorch_model.bin), which can run code" in message
    assert "pytorch_model.bin" in refused("sample", "pickled", "1+1=")
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, adapter / "adapter_model.bin")
    assert "holds only pickled weights (adapter_model.bin)" in train(GRPO, top={"model": "adapter"})


def test_a_folder_that_is_no_model_is_refused(train: Refused, folder: Path, model: Path) -> None:
    (folder / "models").mkdir()
    assert "'models' has no config.json" in train(GRPO, top={"model": str(folder / "models")}).replace(
        str(folder) + "/", ""
    )
    assert "is a file; give a Hugging Face folder or a .gguf file" in train(GRPO, top={"model": "data.jsonl"})
    (folder / "x.gguf").write_text("not one")
    assert "x.gguf' could not be loaded" in train(GRPO, top={"model": "x.gguf"})


def test_messages_need_a_chat_template(train: Refused, folder: Path, model: Path) -> None:
    shutil.copytree(model, folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = train(GRPO | {"data": "chats.jsonl"}, top={"model": "plain"})
    assert re.search(
        r"chats.jsonl:\d+ is a chat, but the model's tokenizer has no chat template; set `chat_template", message
    )


def test_a_prompt_or_demonstration_longer_than_the_context_is_named(train: Refused, folder: Path) -> None:
    rows = [*ROWS, {"prompt": "1" * 600 + "+1=", "answer": "2"}]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = train(GRPO | {"data": "long.jsonl", "held_out": "data.jsonl"})
    assert "long.jsonl:17: the prompt has 604 tokens, and 508 fit; shorten it, remove the row" in message
    rows = [*DEMOS, {"prompt": "1+1=", "completion": "2" * 600}]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = train(SFT | {"data": "long.jsonl", "held_out": "demos.jsonl"})
    assert re.search(r"long.jsonl:17: the demonstration has 606 tokens, and 512 fit", message)


# -- rewards ----------------------------------------------------------------------------------------------------------

BROKEN = [
    ("mine.py:raises", "reward 'raises' failed on 4 of 4 completions", "KeyError: 'price list' (mine.py:5)"),
    ("mine.py:nan", "reward 'nan' failed on 4 of 4 completions", "returned nan"),
    ("mine.py:one_too_few", "reward 'one_too_few' failed on 4 of 4", "returned 3 scores for 4 completions"),
    ("mine.py:hangs", "reward 'hangs' failed", "timeout: had not returned after 0.2 s at mine.py:14"),
    ("mine.py:text", "reward 'text' failed on 4 of 4", "returned a str ('good'), not a number"),
    ("mine.py:nothing", "no completion sampled at step 1 has a reward", "every part of the reward returned None"),
    ("mine.py:needs", "reward 'needs' needs the column 'price'", "data.jsonl:"),
    ("mine.py:shapeless", "reward 'shapeless': its parameters are (a, b)", "one must be called `completion`"),
    ("mine.py:rasies", "mine.py has no 'rasies'", "did you mean 'raises'?"),
    ("mien.py:raises", "mien.py' does not exist", "did you mean 'mine.py'?"),
    ("broken.py:score", "reward 'score': broken.py cannot be imported: SyntaxError", "line 2"),
    ("minee:raises", "reward 'raises': there is no module 'minee'", "did you mean 'mine'?"),
    ("qqzzqq:vat", "reward 'vat': there is no module 'qqzzqq'", "looked for beside the recipe"),
    ("exakt", "reward 'exakt': use = 'exakt' is no built-in", "did you mean 'exact'?"),
]


@pytest.mark.parametrize(("use", "what", "why"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_reward_that_does_not_score_is_named(use: str, what: str, why: str, train: Refused) -> None:
    message = train(changed(GRPO, "rewards", [{"use": use, "timeout": 0.2}]))
    assert what in message and why in message


@pytest.mark.parametrize("use", ["mine.py:raises", "mine.py:needs", "exakt"])
def test_a_gold_that_does_not_score_is_named(use: str, train: Refused) -> None:
    assert f"reward {use.rpartition(':')[2]!r}" in train(changed(GRPO, "gold", [{"use": use}]))


def test_a_verifiers_arguments_are_checked(train: Refused) -> None:
    part: dict[str, Any] = {"use": "exact", "args": {"answer": "solution"}}
    assert "reward 'exact' needs the column 'solution'" in train(changed(GRPO, "rewards", [part]))
    part = {"use": "exact", "args": {"anser": "x"}}
    assert "reward 'exact': unknown argument 'anser'; did you mean 'answer'?" in train(changed(GRPO, "rewards", [part]))
    assert "reward 'regex': args lacks 'pattern'" in train(changed(GRPO, "rewards", [{"use": "regex"}]))
    part = {"use": "regex", "args": {"pattern": "("}}
    assert "pattern '(' is not a valid regular expression" in train(changed(GRPO, "rewards", [part]))


def test_a_reward_that_fails_later_leaves_the_run_to_be_resumed(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = changed(GRPO, "rewards", [{"use": "mine.py:raises_late"}]) | {"steps": 4, "checkpoint_every": 1}
    (folder / "recipe.toml").write_text(tomli_w.dumps({"model": str(model), "out": "run", "stage": [stage]}))
    assert cli.main(["train", "recipe.toml", "--quiet"]) == 2
    assert "reward 'raises_late' failed on 2 of 4 completions" in capsys.readouterr().err
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "failed"
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").open()] == [1]
    (folder / "mine.py").write_text("def raises_late(completion):\n    return float(len(completion) % 2)\n")
    assert cli.main(["resume", "run", "--quiet"]) == 0
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_some_failures_may_be_allowed(folder: Path, model: Path) -> None:
    (folder / "mine.py").write_text(
        "def flaky(completion, seen=[]):\n    seen.append(1)\n    return 1 / (len(seen) % 4) if len(seen) > 0 else 0\n"
    )
    stage = changed(GRPO, "rewards", [{"use": "mine.py:flaky"}]) | {"max_reward_failures": 0.3}
    (folder / "recipe.toml").write_text(tomli_w.dumps({"model": str(model), "out": "run", "stage": [stage]}))
    assert cli.main(["train", "recipe.toml", "--quiet"]) == 0
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert [record["reward/failed"] for record in records] == [1, 1]
    rows = [json.loads(line) for line in (folder / "run" / "rollouts" / "step-000001.jsonl").open()]
    assert [row["reward"] for row in rows] == [1.0, 0.5, pytest.approx(1 / 3), None]
    assert records[0]["reward/mean"] == pytest.approx((1 + 0.5 + 1 / 3) / 3)


# -- the other verbs --------------------------------------------------------------------------------------------------


def test_other_verbs_say_what_they_need(refused: Refused, folder: Path, model: Path) -> None:
    tiny = str(model)
    (folder / "there.toml").write_text("")
    assert "there.toml exists already; name another file" in refused("init", "there.toml")
    assert "method 'gpro' is not one of sft, grpo" in refused("init", "--method", "gpro")
    assert "no/such/dir/r.toml cannot be written" in refused("init", "no/such/dir/r.toml")
    assert "run 'nowhere' does not exist" in refused("resume", "nowhere")
    assert "is not a run" in refused("resume", ".")
    assert "run 'nowhere' does not exist" in refused("report", "nowhere")
    assert "'.' is not a run directory" in refused("report", ".")
    assert "say what to measure on: --data FILE and --use VERIFIER" in refused("eval", tiny)
    assert "say what to measure on" in refused("eval", tiny, "--data", "data.jsonl")
    assert "'none.jsonl' does not exist" in refused("eval", tiny, "--data", "none.jsonl", "--use", "exact")
    assert "--columns 'prompt' is not NEW=OLD" in refused("eval", tiny, "--columns", "prompt")
    wrong = refused("eval", tiny, "--data", "data.jsonl", "--use", "math", "--columns", "solution=answer")
    assert "reward 'math' needs the column 'answer'; did you mean" in wrong or "needs the column 'answer'" in wrong
    assert "use = 'exat' is no built-in; did you mean 'exact'?" in refused(
        "eval", tiny, "--data", "data.jsonl", "--use", "exat"
    )
    kept = ["eval", tiny, "--data", "data.jsonl", "--use", "exact", "--out"]
    assert "--out 'data.jsonl/x.jsonl' cannot be written: data.jsonl is not a folder" in refused(
        *kept, "data.jsonl/x.jsonl"
    )
    assert "--out '.' cannot be written; name a .jsonl file" in refused(*kept, ".")
    assert "model './nowhere' does not exist" in refused("sample", "./nowhere", "hi")
    assert "do not fit the model's context of 512; shorten the prompt" in refused("sample", tiny, "1" * 600)
    assert "do not fit the model's context of 512; use --max-tokens" in refused(
        "sample", tiny, "1+1=", "--max-tokens", "600"
    )
    assert "n = 0 must be at least 1" in refused("sample", tiny, "1+1=", "--n", "0")
    assert "top_p = 2.0 is not in (0, 1]" in refused("sample", tiny, "1+1=", "--top-p", "2")
    assert "temperature = -1.0 must be at least 0" in refused("sample", tiny, "1+1=", "--temperature", "-1")


def test_a_run_without_a_checkpoint_cannot_be_sampled_or_measured(refused: Refused, folder: Path, model: Path) -> None:
    from truecourse import recipe as recipes
    from truecourse.run.directory import RunDirectory

    RunDirectory.create(folder / "new", recipes.from_table({"model": str(model), "stage": [GRPO]}), {})
    for verb in (["sample", "new", "1+1="], ["eval", "new"]):
        assert "run 'new' has no checkpoint yet; continue it with `truecourse resume new`" in refused(*verb)


# -- the command ------------------------------------------------------------------------------------------------------


def test_usage_errors_are_short_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in {
        ("trian",): "train",
        ("train",): "PATH",
        ("train", "x.toml", "--sett", "a=b"): "--set KEY=VALUE",
        ("eval", "tiny", "--prompts", "many"): "--prompts",
    }.items():
        assert cli.main(list(args)) == 2
        out, err = capsys.readouterr()
        assert not out and expected in err and len(err.splitlines()) < 16 and "Traceback" not in err
    assert cli.main(["--help"]) == 0
    assert cli.main(["train", "--help"]) == 0


def test_a_traceback_is_shown_where_it_is_asked_for(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(["train", "none.toml", "--traceback"])


def test_a_rewards_own_traceback_is_shown_where_it_is_asked_for(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = changed(GRPO, "rewards", [{"use": "mine.py:raises"}])
    (folder / "r.toml").write_text(tomli_w.dumps({"model": str(model), "out": "run", "stage": [stage]}))
    with pytest.raises(ValueError, match="reward 'raises' failed"):
        cli.main(["train", "r.toml", "--quiet", "--traceback"])
    error = capsys.readouterr().err
    assert 'raise KeyError("price list")' in error and "mine.py" in error


def test_the_exit_code_reaches_the_shell(folder: Path) -> None:
    def shell(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "truecourse", *args], capture_output=True, text=True)

    done = shell("train", "none.toml")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: recipe 'none.toml' does not")
    assert shell("trian").returncode == 2
    assert "Traceback" in shell("train", "none.toml", "--traceback").stderr


def test_an_error_of_our_own_is_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from truecourse import trainer

    monkeypatch.setattr(trainer, "train", lambda *a, **k: 1 / 0)
    (folder / "r.toml").write_text(tomli_w.dumps({"stage": [GRPO]}))
    assert cli.main(["train", "r.toml"]) == 1
    error = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: division by zero" in error and "--traceback" in error
