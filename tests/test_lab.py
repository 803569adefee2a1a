"""The built-in tasks and the shipped tiny model."""

import json
import re
from pathlib import Path

import pytest

from truecourse import recipe as recipes
from truecourse.data.formats import demonstrations, prompts_for_rl
from truecourse.data.sources import read
from truecourse.data.split import leaks, split
from truecourse.data.template import Template
from truecourse.lab import tasks, tiny

HERE = Path(".")


def operands(row) -> frozenset[int]:
    a, b = re.fullmatch(r"(\d\d)\+(\d\d)=", row.values["prompt"][0]["content"]).groups()
    return frozenset((int(a), int(b)))


def test_sums_are_all_there_right_and_always_the_same():
    train, held = read("lab:sums", HERE), read("lab:sums-held-out", HERE)
    assert (len(train), len(held)) == (7600, 500)
    asked = [row.values["prompt"][0]["content"] for row in train + held]
    assert sorted(asked) == sorted(f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100))
    for row in train + held:
        a, b = map(int, row.values["prompt"][0]["content"].rstrip("=").split("+"))
        assert int(row.values["answer"]) == a + b
    assert [asked[0], asked[-1]] == ["61+66=", "54+54="]


def test_held_out_sums_cannot_leak():
    """Neither a prompt nor its commuted twin is trained on: whichever way the rows are split."""
    train, held, demos = (read(f"lab:{name}", HERE) for name in ("sums", "sums-held-out", "sums-demos"))
    assert not {operands(r) for r in train + demos} & {operands(r) for r in held}
    assert not leaks(train + demos, held)
    assert {d.prompt[0]["content"] for d in demonstrations(demos)} <= {r.values["prompt"][0]["content"] for r in train}
    for held_out in (0.1, 200):
        a, b = split(train, held_out, 7)
        assert not {operands(r) for r in a} & {operands(r) for r in b}


def test_demonstrations_answer_right():
    demos = demonstrations(read("lab:sums-demos", HERE))
    assert len(demos) == len({d.prompt[0]["content"] for d in demos}) == tasks.DEMOS
    for prompt, completion, _ in demos:
        a, b = map(int, prompt[0]["content"].rstrip("=").split("+"))
        assert completion == [{"role": "assistant", "content": str(a + b)}]


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny.path()), AutoTokenizer.from_pretrained(tiny.path())


def test_the_shipped_folder_is_small_and_plain(shipped):
    model, _ = shipped
    assert sum(file.stat().st_size for file in tiny.path().iterdir()) < 1_000_000
    assert model.config.model_type == "llama" and model.num_parameters() == 117_440
    # nothing of the machine that it was made on
    for file in tiny.path().iterdir():
        if file.suffix != ".safetensors":
            assert not re.search(r"/(tmp|home|root|work)/", file.read_text(encoding="utf-8")), file.name


def test_every_text_survives_the_tokenizer(shipped):
    _, tokenizer = shipped
    t = Template(tokenizer)
    for text in ("47+38=85", " a  b\n\t", "é ü 漢字 🙂", "".join(map(chr, range(32, 127))), "don 't , . !"):
        assert t.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("47+38=", add_special_tokens=False)["input_ids"]) == 6
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_its_chat_template_ends_turns(shipped):
    model, tokenizer = shipped
    t = Template(tokenizer)
    assert t.end_ids == (tokenizer.eos_token_id,) == (model.generation_config.eos_token_id,)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    answer = [{"role": "assistant", "content": "2"}]
    assert tokenizer.decode(t.prompt_tokens(chat)) == "<|bos|><|system|>s<|end|><|user|>1+1=<|end|><|assistant|>"
    assert tokenizer.decode(t.completion_tokens(chat, answer)) == "2<|end|>"
    with pytest.raises(ValueError, match="not tool"):
        t.prompt_tokens([{"role": "tool", "content": "x"}])


def test_a_fresh_model_follows_from_its_seed():
    import torch

    before = torch.get_rng_state()
    one, same, other = (tiny.new_model(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random stream is left alone"


def test_the_shipped_model_answers_about_two_in_five(shipped):
    """Greedy, on all 500 held-out sums: a start that leaves room, made by the recipe beside it."""
    import torch

    model, tokenizer = shipped
    prompts = Template(tokenizer).prompts(prompts_for_rl(read("lab:sums-held-out", HERE)))
    ids = torch.tensor([p.tokens for p in prompts])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    right = sum(text == p.row["answer"] for text, p in zip(texts, prompts, strict=True)) / len(prompts)
    assert right == pytest.approx(0.40, abs=0.01)


def test_its_recipes_load():
    (stage,) = recipes.load(tiny.path() / "sft.toml").stage
    assert stage.method == "sft" and stage.data == "lab:sums-demos" and stage.stop_at > 0
    quickstart = recipes.load(tiny.path().parent / "quickstart.toml")
    (stage,) = quickstart.stage
    assert (quickstart.model, stage.data, stage.held_out) == ("tiny", "lab:sums", "lab:sums-held-out")


def test_build_writes_a_model_folder_by_the_sft_stage(tmp_path, monkeypatch):
    """A few steps in place of all of them; the whole build takes about 20 CPU-seconds."""
    import dataclasses

    from transformers import AutoModelForCausalLM

    from truecourse.lab import build

    recipe = recipes.load(tiny.path() / "sft.toml")
    short = dataclasses.replace(recipe.stage[0], steps=4, gold_every=2, gold_prompts=20)
    monkeypatch.setattr(build.recipes, "load", lambda _: dataclasses.replace(recipe, stage=(short,)))
    build.build(tmp_path / "made", quiet=True)
    assert {p.name for p in (tmp_path / "made").iterdir()} == {*build.KEPT}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict()
    fresh = tiny.new_model(recipe.seed).state_dict()
    assert all(model[k].shape == fresh[k].shape for k in fresh) and json.loads(
        (tmp_path / "made/config.json").read_text()
    )


@pytest.mark.slow
def test_the_build_gives_the_shipped_model_again(tmp_path):
    from truecourse.lab import build

    assert build.build(tmp_path / "made", quiet=True) == pytest.approx(0.288, abs=0.03)
