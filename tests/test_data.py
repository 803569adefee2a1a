"""Sources, formats, chat templates, the split and the order of rows."""

import gzip
import json
import re
from pathlib import Path

import pytest

from truecourse.data.formats import demonstrations, prompts_for_rl
from truecourse.data.order import take
from truecourse.data.pairs import comparisons, pairs
from truecourse.data.sources import Row, read
from truecourse.data.split import leaks, split
from truecourse.data.template import Template, load_chat_template
from truecourse.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows_of(*values: dict) -> list[Row]:
    return [Row(v, f"data.jsonl:{i}") for i, v in enumerate(values, 1)]


# -- sources ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets

    values = [{"prompt": 'a, "quoted"\nline\u2028', "answer": "é"}, {"prompt": "b", "answer": "2"}]
    lines = "\n".join(json.dumps(v, ensure_ascii=False) for v in values) + "\n\n"
    write(tmp_path, "d.jsonl", lines)
    write(tmp_path, "bom.jsonl", b"\xef\xbb\xbf" + lines.encode())
    write(tmp_path, "crlf.jsonl", lines.replace("\n", "\r\n"))
    write(tmp_path, "d.jsonl.gz", gzip.compress(lines.encode()))
    write(tmp_path, "d.json", json.dumps(values))
    write(tmp_path, "d.csv", '\ufeffprompt,answer\n"a, ""quoted""\nline\u2028",é\nb,2\n')
    made = datasets.Dataset.from_list(values)
    made.to_parquet(str(tmp_path / "d.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made.select([0]), "test": made}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", "train.jsonl", lines)

    names = ["d.jsonl", "bom.jsonl", "crlf.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.parquet", "saved", "splits:test"]
    for name in [*names, "files", "./files", str(tmp_path / "d.jsonl")]:
        assert [r.values for r in read(name, tmp_path)] == values, name
    assert len(read("splits", tmp_path)) == 1
    assert [r.where for r in read(("d.jsonl", "d.csv"), tmp_path)] == [
        "d.jsonl:1",
        "d.jsonl:2",
        "d.csv row 1",
        "d.csv row 2",
    ]


def test_columns_are_renamed(tmp_path):
    write(tmp_path, "d.jsonl", '{"question": "1+1?", "answer": "2"}')
    assert read("d.jsonl", tmp_path, {"prompt": "question"})[0].values == {"prompt": "1+1?", "answer": "2"}
    swapped = read("d.jsonl", tmp_path, {"question": "answer", "answer": "question"})[0].values
    assert swapped == {"question": "2", "answer": "1+1?"}
    with pytest.raises(UserError, match=r"d.jsonl:1: columns.prompt = 'questoin', .* did you mean 'question'"):
        read("d.jsonl", tmp_path, {"prompt": "questoin"})
    with pytest.raises(UserError, match="has a column 'answer' of its own"):
        read("d.jsonl", tmp_path, {"answer": "question"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"a": 1}\n{"a": 1,}\n', r"d.jsonl:2: not valid JSON: .* at column \d+"),
        ("d.jsonl", '{"a": 1}\n\n{"a"', r"d.jsonl:3: not valid JSON"),
        ("d.jsonl", '{"a": 1}\n[1]\n', r"d.jsonl:2: a list, not an object"),
        ("d.jsonl", '{"a": NaN}\n', r"d.jsonl:1: NaN is not JSON"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"d.jsonl:2: byte 0xe9 is not UTF-8"),
        ("d.jsonl", '{"a": 1}'.encode("utf-16"), r"d.jsonl:1: byte 0xff is not UTF-8"),
        ("d.jsonl", "[" * 100_000, r"d.jsonl:1: (nested too deeply|not valid JSON)"),
        ("d.jsonl", "\n \n", r"'d.jsonl' has no rows"),
        ("d.jsonl", "", r"'d.jsonl' has no rows"),
        ("d.jsonl.gz", b"not gzip", r"'d.jsonl.gz' cannot be read: Not a gzipped file"),
        ("d.json", '{"a": 1}', r"d.json holds an object, not a list"),
        ("d.json", '{"a": 1}\n{"a": 2}', r"rename it to .jsonl"),
        ("d.json", '[\n{"a": }]', r"d.json: not valid JSON: .* at line 2, column 7"),
        ("d.json", '[{"a": 1}, 2]', r"d.json row 2: a number, not an object"),
        ("d.json", b'[\n"\xff"]', r"d.json:2: byte 0xff"),
        ("d.csv", "a,b\n1,2\n3\n", r"d.csv row 2 \(line 3\) has 1 cells for 2 columns"),
        ("d.csv", "a,a\n1,2\n", r"must name every column once"),
        ("d.csv", ",a\n1,2\n", r"must name every column once"),
        ("d.csv", 'a\n"1\n', r"d.csv:\d: not valid CSV"),
        ("d.csv", "a,b\n", r"'d.csv' has no rows"),
        ("d.parquet", b"PAR1", r"d.parquet is not a readable Parquet file"),
        ("d.txt", "x", r"'d.txt': files are read as .jsonl"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path, name, content, message):
    write(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read(name, tmp_path)


def test_a_source_that_is_not_there(tmp_path, monkeypatch):
    write(tmp_path, "train.jsonl", '{"prompt": "a"}')
    (tmp_path / "junk").mkdir()
    for name, message in [
        ("trian.jsonl", r"'trian.jsonl' does not exist in .*did you mean 'train.jsonl'"),
        ("zzz.csv", r"that folder has train.jsonl"),
        ("no/train.jsonl", r"there is no folder .*no'"),
        ("./nothing", r"does not exist"),
        ("junk", r"'junk' is not a folder that `datasets` can read"),
        ("lab:summs", r"not a built-in task; .*did you mean 'lab:sums'"),
        ("a/b/c/d", r"neither a file nor a hub id"),
        # tests run with HF_HUB_OFFLINE, so that the hub answers as it does without a network
        ("openai/gsm8k/main:test", r"'openai/gsm8k/main:test' is neither a file .* check the name and the network"),
    ]:
        with pytest.raises(UserError, match=message):
            read(name, tmp_path)


def test_an_unknown_split_is_named(tmp_path):
    import datasets

    made = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    made.to_parquet(str(tmp_path / "files" / "train.parquet"))
    for name in ("splits:tset", "files:tset"):
        with pytest.raises(UserError, match="tset"):
            read(name, tmp_path)


def test_gsm8k_reads(shared_data):
    rows = read("test.jsonl", shared_data / "gsm8k", {"prompt": "question"})
    prompts = prompts_for_rl(rows, chat=True)
    assert len(prompts) == 1319 and prompts[0].columns["answer"].endswith("#### 18")
    assert prompts[0].content[0]["content"].startswith("Janet")


# -- formats: every example of the page -------------------------------------------------------------------------------


def examples(kind: str) -> dict[str, str]:
    found = re.findall(rf"<!-- {kind}: (.+?) -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return dict(found)


def test_the_page_keeps_its_word(tmp_path):
    texts = examples("example")
    assert set(texts) == {
        "prompt text",
        "prompt chat",
        "completion text",
        "completion chat",
        "messages",
        "comparison",
        "comparison chats",
        "gsm8k",
        "split_key",
    }
    rows = {}
    for name, text in texts.items():
        file = f"{name.split()[0]}.jsonl"
        write(tmp_path, file, text)
        rows[name] = read(file, tmp_path)

    assert prompts_for_rl(rows["prompt text"])[0][:2] == ("What is 47 + 38?", {"answer": "85"})
    chat = prompts_for_rl(rows["prompt chat"])[0]
    assert [m["role"] for m in chat.content] == ["system", "user"] and chat.columns == {"answer": "85"}
    assert demonstrations(rows["completion text"])[0][:2] == ("The capital of Norway is", " Oslo.")
    turn = demonstrations(rows["completion chat"])[0]
    assert turn.completion == [{"role": "assistant", "content": "Oslo."}]
    first, second = demonstrations(rows["messages"])
    assert (len(first.prompt), len(second.prompt)) == (1, 3) and second.completion[0]["content"] == "Santiago."
    assert len(prompts_for_rl(rows["messages"])[0].content) == 3
    compared = prompts_for_rl(rows["comparison"])[0]
    assert compared.columns == {"chosen": "Oslo.", "rejected": "Bergen."}
    for name, prompt in (
        ("comparison", "Capital of Norway?"),
        ("comparison chats", [{"role": "user", "content": "Capital of Norway?"}]),
    ):
        good, bad = comparisons(rows[name])
        assert not bad and pairs(good)[0].prompt == prompt
    with pytest.raises(UserError, match=r"comparison.*rename the column `chosen` to `completion`"):
        demonstrations(rows["comparison"])
    with pytest.raises(UserError, match=re.escape(examples("error")["gsm8k"].strip()) + "$"):
        prompts_for_rl(rows["gsm8k"])
    assert prompts_for_rl(rows["split_key"])[0].columns == {"answer": "85"}
    for seed in range(20):
        with pytest.raises(UserError, match="1 distinct prompts"):
            split(rows["split_key"], 0.5, seed)


def test_completion_columns_do_not_reach_the_reward():
    row = rows_of({"prompt": "a", "completion": "b", "answer": 3})
    assert prompts_for_rl(row)[0].columns == {"answer": 3}


def test_a_text_completion_may_answer_a_chat():
    row = rows_of({"prompt": [{"role": "user", "content": "a"}], "completion": "b"})
    assert demonstrations(row)[0].completion == [{"role": "assistant", "content": "b"}]
    plain = rows_of({"prompt": "a", "completion": "b"})
    assert demonstrations(plain, chat=True)[0] == demonstrations(row)[0]


def test_null_fields_of_messages_are_dropped(tmp_path):
    import datasets

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    datasets.Dataset.from_list([{"messages": chat}]).to_parquet(str(tmp_path / "d.parquet"))
    assert "name" in read("d.parquet", tmp_path)[0].values["messages"][0]
    assert demonstrations(read("d.parquet", tmp_path))[0].prompt == [{"role": "user", "content": "a"}]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (prompts_for_rl, {"promt": "a"}, r"`prompt` may be 'promt'"),
        (prompts_for_rl, {"x": "a"}, r"data.jsonl:1 has the columns x; grpo needs `prompt`"),
        (prompts_for_rl, {"prompt": ""}, r"data.jsonl:1: the prompt is empty"),
        (prompts_for_rl, {"prompt": 3}, r"`prompt` is of type int"),
        (prompts_for_rl, {"prompt": None}, r"`prompt` is empty"),
        (prompts_for_rl, {"prompt": []}, r"`prompt` is empty"),
        (prompts_for_rl, {"prompt": [USER, ASSISTANT]}, r"the prompt ends with an assistant turn"),
        (prompts_for_rl, {"messages": [ASSISTANT]}, r"nothing stands before"),
        (prompts_for_rl, {"messages": [{"from": "human", "value": "a"}]}, r"ShareGPT"),
        (prompts_for_rl, {"messages": [{"role": "bot", "content": "a"}]}, r"role 'bot', not one of"),
        (prompts_for_rl, {"messages": ["a"]}, r"message 0 is 'a'"),
        (prompts_for_rl, {"messages": [{"role": "user"}]}, r"needs text as its content"),
        (prompts_for_rl, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"needs text"),
        (prompts_for_rl, {"prompt": "a", "tools": [{}]}, r"`tools` column"),
        (demonstrations, {"prompt": "a", "answer": "b"}, r"rename `answer` to `completion`"),
        (demonstrations, {"question": "a", "answer": "b"}, r"rename `question` to `prompt`, and rename `answer` to"),
        (demonstrations, {"conversations": []}, r"rename `conversations` to `messages`"),
        (demonstrations, {"prompt": "a", "completion": ""}, r"the completion is empty"),
        (demonstrations, {"prompt": "a", "completion": [ASSISTANT]}, r"`completion` must be text"),
        (demonstrations, {"prompt": [USER], "completion": [USER]}, r"no assistant turn"),
        (demonstrations, {"messages": [USER]}, r"no assistant turn"),
        (demonstrations, {"messages": [ASSISTANT, USER, ASSISTANT]}, r"opens with an assistant turn"),
        (demonstrations, {"messages": [USER, ASSISTANT, USER]}, r"ends with a user turn"),
        (demonstrations, {"messages": [USER, {"role": "assistant", "content": ""}]}, r"the completion is empty"),
        (demonstrations, {"messages": "a"}, r"`messages` is of type str"),
    ],
)
def test_wrong_rows_are_refused_by_name(make, values, message):
    with pytest.raises(UserError, match=message):
        make(rows_of(values))


# -- templates --------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}"
THINK = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with a `<bos>` in front, whose merges cross the boundaries between words and digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["4747474747 assistant user Oslo. The capital is 47"] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    extra = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", additional_special_tokens=extra
    )


CHAT = [
    {"role": "user", "content": "Capital?"},
    {"role": "assistant", "content": "Oslo."},
    {"role": "user", "content": "47"},
]
ANSWER = [{"role": "assistant", "content": "47 47."}]


@pytest.mark.parametrize("template", [CHATML, LLAMA, PHI, NO_END], ids=["chatml", "llama", "phi", "no-end"])
def test_prompt_and_completion_are_the_conversation(bpe, template):
    """Their tokens are those of the whole rendered conversation, up to what follows the end of the turn."""
    t = Template(bpe, template)
    prompt, completion = t.prompt_tokens(CHAT), t.completion_tokens(CHAT, ANSWER)
    whole = bpe.apply_chat_template([*CHAT, *ANSWER], chat_template=template, return_dict=False)
    if template != NO_END:
        assert list(prompt + completion) == whole[: len(prompt + completion)]
        assert bpe.decode(whole[len(prompt + completion) :], skip_special_tokens=True).strip() == ""
    assert list(prompt) == bpe.apply_chat_template(
        CHAT, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert completion[-1] in t.end_ids and not set(completion[:-1]) & set(t.end_ids)
    assert t.decode(completion).strip() == "47 47."


def test_end_ids_come_from_tokenizer_template_and_generation_config(bpe):
    names = bpe.convert_tokens_to_ids
    assert Template(bpe).end_ids == (names("<eos>"),)
    assert Template(bpe, CHATML).end_ids == (names("<eos>"), names("<|im_end|>"))
    assert Template(bpe, PHI).turn_end == names("<|im_end|>")
    assert Template(bpe, LLAMA).turn_end == names("<eos>")
    assert Template(bpe, NO_END).turn_end is None
    assert Template(bpe, None, [7, 7, 300]).end_ids == (1, 7, 300)
    # without an end token of its own, a template's completion ends with the tokenizer's
    assert Template(bpe, NO_END, [7]).completion_tokens(CHAT, ANSWER)[-1] == names("<eos>")


def test_plain_text_gets_bos_once_and_eos_behind_the_completion(bpe):
    t = Template(bpe)
    assert t.prompt_tokens("47") == tuple(bpe("47")["input_ids"]) and t.prompt_tokens("47")[0] == 0
    assert t.prompt_tokens("<bos>47") == t.prompt_tokens("47")
    assert t.completion_tokens("The capital is", " Oslo.")[-1] == 1
    assert t.completion_tokens("The capital is", " Oslo.<eos>") == t.completion_tokens("The capital is", " Oslo.")
    assert t.decode(t.completion_tokens("The capital is", " Oslo.")) == " Oslo."


def test_a_prompt_keeps_its_tokens_where_the_tokenizer_would_merge_across_the_boundary(bpe):
    t = Template(bpe)
    assert len(bpe("47", add_special_tokens=False)["input_ids"]) == 1, "the tokenizer merges these two"
    prompt, completion = t.prompt_tokens("4"), t.completion_tokens("4", "7")
    assert bpe.convert_ids_to_tokens(prompt) == ["<bos>", "4"]
    assert bpe.convert_ids_to_tokens(completion) == ["7", "<eos>"]


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(bpe):
    import copy

    from tokenizers import processors

    ending = copy.deepcopy(bpe)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert ending("a")["input_ids"][-1] == 1
    assert Template(ending).prompt_tokens("a") == Template(bpe).prompt_tokens("a")


def test_a_continuation_has_the_tokens_of_the_whole_text(shared_data):
    """A sentencepiece tokenizer puts a space before every text; not before a completion."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    t = Template(tokenizer)
    prompt = t.prompt_tokens("Once upon a time")
    assert prompt[0] == 1
    whole = tokenizer("Once upon a time, there was")["input_ids"]
    assert list(prompt + t.completion_tokens("Once upon a time", ", there was"))[:-1] == whole


def test_templates_that_cannot_be_learned_from_are_refused(bpe):
    with pytest.raises(UserError, match=r"data.jsonl:3: the chat template renders the prompt to another text"):
        Template(bpe, THINK).completion_tokens(CHAT, ANSWER, "data.jsonl:3")
    with pytest.raises(UserError, match=r"data.jsonl:3 is a chat, .* no chat template; set `chat_template ="):
        Template(bpe).prompt_tokens(CHAT, "data.jsonl:3")
    with pytest.raises(UserError, match="refuses this chat: no users"):
        Template(
            bpe, CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no users') }}{% endif %}"
        ).prompt_tokens([{"role": "system", "content": "x"}])
    with pytest.raises(UserError, match="the chat template refuses"):
        Template(bpe, "{% for m in messages %}")
    with pytest.raises(UserError, match=r"goes on behind the end token <\|im_end\|>"):
        Template(bpe, CHATML).completion_tokens(CHAT, [{"role": "assistant", "content": "a<|im_end|>b"}])
    with pytest.raises(UserError, match="row 1: the prompt is empty once it is tokenised"):
        Template(bpe, "{% if messages|length > 1 %}x{% endif %}").prompt_tokens(CHAT[:1], "row 1")


def test_a_tokenizer_without_end_token_is_refused(bpe):
    import copy

    endless = copy.deepcopy(bpe)
    endless.eos_token = None
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        Template(endless)
    assert Template(endless, CHATML).end_ids == (3,)


def test_prompts_longer_than_the_context_are_refused_by_row(bpe):
    t = Template(bpe)
    rows = prompts_for_rl(rows_of({"prompt": "a"}, {"prompt": "abcdef"}, {"prompt": "x" * 50}))
    assert [p.index for p in t.prompts(rows)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"data.jsonl:2 \(and 1 more rows\): the prompt has 7 tokens, and 6 fit"):
        t.prompts(rows, max_length=6)
    with pytest.raises(UserError, match=r"data.jsonl:1: the demonstration has 6 tokens, and 5 fit"):
        t.demonstration(demonstrations(rows_of({"prompt": "ab", "completion": "cd"}))[0], max_length=5)


def test_a_chat_template_file(tmp_path, bpe):
    write(tmp_path, "chat.jinja", CHATML)
    assert Template(bpe, load_chat_template("chat.jinja", tmp_path)).turn_end == 3
    assert load_chat_template("", tmp_path) is None
    with pytest.raises(UserError, match=r"'caht.jinja' does not exist .* did you mean 'chat.jinja'"):
        load_chat_template("caht.jinja", tmp_path)


# -- split and order --------------------------------------------------------------------------------------------------


def prompts(n: int, **columns) -> list[Row]:
    return rows_of(*[{"prompt": f"question {i}", "n": i, **columns} for i in range(n)])


def sides(rows, held_out, seed=0):
    train, held = split(rows, held_out, seed)
    return {r.values["n"] for r in train}, {r.values["n"] for r in held}


def test_a_share_is_stable_when_rows_are_added_or_moved():
    train, held = sides(prompts(1000), 0.1)
    assert 70 < len(held) < 130 and len(train) + len(held) == 1000
    train_2, held_2 = sides(prompts(2000)[::-1], 0.1)
    assert train <= train_2 and held <= held_2
    assert sides(prompts(1000), 0.1, seed=1)[1] != held
    # the same bits on every machine: part of what makes two runs comparable
    assert sorted(sides(prompts(60), 0.1)[1]) == [0, 4, 8, 19, 42, 45]


def test_a_count_takes_that_many_distinct_prompts():
    rows = [r for r in prompts(50) for _ in range(3)]
    train, held = split(rows, 7)
    assert len({r.values["prompt"] for r in held}) == 7 and len(held) == 21 and len(train) == 129


def test_the_same_prompt_is_never_on_both_sides():
    chat = [{"role": "user", "content": "question  3 "}]
    rows = prompts(40)
    rows += rows_of(
        *[{"prompt": f" question\n{i}", "n": 100 + i} for i in range(40)],
        {"prompt": chat, "n": 203},
        {"messages": [*chat, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "n": 303},
    )
    for seed in range(10):
        for side in sides(rows, 0.3, seed):
            assert {n % 100 for n in side if n < 100} == {n % 100 for n in side if 100 <= n < 200}
            assert len(side & {3, 103, 203, 303}) in (0, 4)
        assert not leaks(*split(rows, 0.3, seed)) and not leaks(*split(rows, 5, seed))


def test_rows_with_one_split_key_stay_together():
    rows = rows_of(
        *[
            {"prompt": f"{a}+{b}=", "n": a * b, "split_key": f"{min(a, b)} {max(a, b)}"}
            for a in range(9)
            for b in range(9)
        ]
    )
    for held_out in (0.3, 20):
        train, held = split(rows, held_out, 3)
        assert not {r.values["split_key"] for r in train} & {r.values["split_key"] for r in held}
    assert len(held) in (20, 21)
    both = [
        next(r for r in train if r.values["prompt"] == p)
        for p in {"1+2=", "2+1="}
        if any(r.values["prompt"] == p for r in train)
    ]
    assert len(both) in (0, 2)


def test_leaks_are_found_in_a_held_out_file():
    train = prompts(5) + rows_of({"prompt": "x+y", "split_key": "k"})
    held = rows_of({"prompt": "question  3"}, {"prompt": "new"}, {"prompt": "y+x", "split_key": "k"}, {"prompt": "x+y"})
    assert [(t.values["prompt"], h.values["prompt"]) for t, h in leaks(train, held)] == [
        ("question 3", "question  3"),
        ("x+y", "y+x"),
        ("x+y", "x+y"),
    ]


@pytest.mark.parametrize("held_out", [0.0001, 5, 6, 1.0, 1.5, -1, -0.5])
def test_a_split_with_an_empty_side_is_refused(held_out):
    with pytest.raises(UserError, match="held_out = "):
        split(prompts(5), held_out)


def test_zero_holds_nothing_out():
    assert sides(prompts(3), 0) == ({0, 1, 2}, set()) and sides(prompts(3), 0.0) == ({0, 1, 2}, set())


def test_order_is_a_permutation_for_each_epoch_whatever_the_step():
    size = 37
    whole = take(0, 3 * size, size, seed=5)
    epochs = [whole[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(e) == list(range(size)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    steps, cursor = [], 0
    for count in (1, 16, 30, 5, 40, 19):
        steps += take(cursor, count, size, seed=5)
        cursor += count
    assert steps == whole
    assert take(0, size, size, seed=6) != epochs[0]
    assert take(0, 8, 8, seed=0) == [0, 2, 1, 5, 4, 3, 6, 7]
    # every row comes first equally often: chi-square over 2000 seeds, 9 degrees of freedom, p = 1e-4 at 33.7
    first = [take(0, 1, 10, seed)[0] for seed in range(2000)]
    assert sum((first.count(i) - 200) ** 2 / 200 for i in range(10)) < 33.7
