"""Rewards: every accepted form, every failure, the verifiers and the processes behind them."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from fractions import Fraction
from pathlib import Path

import pytest

from truecourse.data.sequences import Completion, Prompt
from truecourse.errors import UserError
from truecourse.recipe import RewardPart, from_table
from truecourse.rewards import RewardError, answers, build, check_failures
from truecourse.rewards.builtins import Math, Number, Regex
from truecourse.rewards.checker import Checker, CheckerCrash, Deadline

DOCS = Path(__file__).parents[1] / "docs" / "rewards.md"


def completion(text: str, tokens: int = 3) -> Completion:
    return Completion((7,) * tokens, (0.0,) * tokens, "eos", 0, text)


def prompt(index: int = 0, content="ask", **row) -> Prompt:
    return Prompt(index, content, (1,), row)


@pytest.fixture
def made(tmp_path):
    """`made(source, name, **part)`: the reward of one part, a function of that source."""
    rewards = []

    def make(source: str, name: str = "reward", **part):
        (tmp_path / f"mine{len(rewards)}.py").write_text(textwrap.dedent(source))
        use = f"mine{len(rewards)}.py:{name}"
        rewards.append(build([RewardPart(use=use, **part)], base=tmp_path))
        return rewards[-1]

    yield make
    for reward in rewards:
        reward.close()


def score(reward, *texts: str, content="ask", **row):
    return reward.score([prompt(content=content, **row)], [[completion(t) for t in texts]])


def same(a, b) -> bool:
    """Equality of nested lists in which NaN equals NaN."""
    return json.dumps(a) == json.dumps(b)


# -- forms ------------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


PAGE = {  # block: (name, args, row, completions, values)
    "plain": ("correct", {}, {"answer": "4"}, ["4 ", "5"], [1.0, 0.0]),
    "row": ("polite", {}, {"ending": "!"}, ["yes!", "yes"], [1.0, 0.0]),
    "trl": ("shortness", {}, {"budget": 3}, ["a", "b"], [1.0, 1.0]),
    "none": ("german_only", {}, {"language": "en"}, ["a"], [math.nan]),
    "async": ("judged", {}, {}, ["longer", "no"], [1.0, 0.0]),
    "class": ("Keyword", {"word": "north", "bonus": 2.0}, {}, ["go north", "go"], [2.0, 0.0]),
    "named": ("graded", {}, {"answer": "4"}, ["4.", "4", "5."], [1.5, 1.0, 0.5]),
    "steps": ("per_line", {}, {}, ["1=1\nso\n2=2", "no"], [2.0, 0.0]),
    "metric": ("counted", {}, {}, ["a b c", "d"], [1.0, 1.0]),
}


@pytest.mark.parametrize("block", PAGE)
def test_the_pages_examples_run(block, made):
    name, args, row, texts, values = PAGE[block]
    (source,) = [b for b in blocks("python") if b.startswith(f"# {block}\n")]
    scores = score(made(source, name, args=args), *texts, **row)
    assert not scores.failures and same(scores.values_PG, [values])


def test_the_page_shows_nothing_untested():
    names = [b.split("\n")[0].removeprefix("# ") for b in blocks("python")]
    assert sorted(names) == sorted([*PAGE, "python"])
    exec(blocks("python")[names.index("python")], {})
    for block in blocks("toml"):
        parts = tomllib.loads(block)["stage"]["rewards"]
        stage = {"method": "grpo", "data": "lab:x", "rewards": parts}
        assert len(from_table({"stage": [stage]}).stage[0].rewards) == len(parts)


def test_named_parts_and_steps_are_kept(made):
    named = score(
        made("def reward(completion): return {'a': len(completion), 'b': 0.5 if completion else None}"), "xy", ""
    )
    assert named.parts == {"reward": [[2.5, 0.0]], "reward/a": [[2.0, 0.0]], "reward/b": [[0.5, None]]}
    steps = score(made("def reward(completion): return [1.0, -2.5]"), "x", "y")
    assert steps.values_PG == [[-1.5, -1.5]] and steps.steps == {"reward": [[[1.0, -2.5]] * 2]}


def test_batch_dict_of_lists(made):
    scores = score(made("def reward(completions): return {'a': [1, 2], 'b': [None, 0.5]}"), "x", "y")
    assert scores.parts == {"reward": [[1.0, 2.5]], "reward/a": [[1.0, 2.0]], "reward/b": [[None, 0.5]]}


def test_trl_form_sees_what_trl_passes(made):
    reward = made("""
        seen = []
        def reward(prompts, completions, completion_ids, answer, other=None, **kwargs):
            seen.append((prompts, completions, completion_ids, answer, other, sorted(kwargs)))
            return [float(i) for i in range(len(completions))]
    """)
    chat = [{"role": "user", "content": "hi"}]
    prompts = [prompt(0, "text", answer="a", extra=1), prompt(1, chat, answer="b")]
    groups = [[completion("x", 2)], [completion("y", 1), completion("z", 3)]]
    scores = reward.score(prompts, groups)
    assert scores.values_PG == [[0.0], [1.0, 2.0]]  # ragged
    (seen,) = reward._parts[0].form.function.__globals__["seen"]
    said = [[{"role": "assistant", "content": c}] for c in "yz"]
    assert seen[:5] == (["text", chat, chat], ["x", *said], [[7, 7], [7], [7, 7, 7]], ["a", "b", "b"], None)
    assert seen[5] == ["extra", "log_extra", "log_metric"]


def test_trls_own_rewards_are_taken_as_they_are(tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "peer.py").write_text(
        "from trl.rewards import accuracy_reward, think_format_reward, get_soft_overlong_punishment\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
    )
    parts = [RewardPart(use=f"peer.py:{n}") for n in ("accuracy_reward", "think_format_reward", "overlong")]
    reward = build(parts, base=tmp_path)
    chat = [{"role": "user", "content": "half?"}]
    group = [completion(r"<think>a</think>\boxed{\frac{1}{2}}", 2), completion(r"\boxed{2}", 3)]
    scores = reward.score([prompt(0, chat, solution=r"\frac{1}{2}")], [group])
    assert not scores.failures
    assert {k: v[0] for k, v in scores.parts.items()} == {
        "accuracy_reward": [1.0, 0.0],
        "think_format_reward": [1.0, 0.0],
        "overlong": [0.0, -0.5],
    }
    assert scores.columns["accuracy_reward/solution"] == [[r"\frac{1}{2}"] * 2]


def test_async_calls_of_a_group_and_of_parts_run_together(tmp_path):
    (tmp_path / "a.py").write_text(
        "import asyncio\n"
        "async def one(completion):\n    await asyncio.sleep(0.2)\n    return float(completion)\n"
        "async def many(completions):\n    await asyncio.sleep(0.2)\n    return [-float(c) for c in completions]\n"
    )
    reward = build([RewardPart(use="a.py:one", weight=2.0), RewardPart(use="a.py:many")], base=tmp_path)
    began = time.monotonic()
    scores = score(reward, *map(str, range(20)))
    assert time.monotonic() - began < 1.5  # 20 × 0.2 s one after another would be 4 s
    assert scores.values_PG == [[float(i) for i in range(20)]]  # in order
    assert score(reward, "1").values_PG == [[1.0]]  # the loop lives on
    reward.close()


def test_numpy_and_torch_results(made):
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for expression in (
        "np.array([0.5, 1])",
        "torch.tensor([0.5, 1.0])",
        "[np.float32(0.5), torch.tensor(1)]",
        "[0.5, np.True_]",
    ):
        reward = made("import numpy as np, torch\ndef reward(completions): return " + expression)
        assert score(reward, "a", "b").values_PG == [[0.5, 1.0]], (expression, np, torch)


def test_args_are_bound_and_shadow_columns(made):
    reward = made("def reward(completion, scale=1.0, **row): return scale * len(completion)", args={"scale": 3.0})
    assert score(reward, "ab", scale=100.0).values_PG == [[6.0]]


def test_a_mixture_is_the_weighted_sum_and_parts_are_raw(tmp_path):
    (tmp_path / "m.py").write_text(
        "def a(completion): return len(completion)\n"
        "def b(completion): return None if completion == 'x' else -1.5\n"
        "def c(completion): return 100.0\n"
    )
    uses = [("a", 0.5), ("b", 2.0), ("c", 0.0)]
    reward = build([RewardPart(use=f"m.py:{n}", weight=w) for n, w in uses], base=tmp_path)
    scores = reward.score([prompt(0), prompt(1)], [[completion("x"), completion("abc")], [completion("four")]])
    assert scores.values_PG == [[0.5 * 1, 0.5 * 3 - 3.0], [0.5 * 4 - 3.0]]
    assert scores.parts == {"a": [[1.0, 3.0], [4.0]], "b": [[None, -1.5], [-1.5]], "c": [[100.0, 100.0], [100.0]]}
    assert scores.failed_share == 0 and set(scores.seconds) == {"a", "b", "c"}
    again = reward.score([prompt(0), prompt(1)], [[completion("x"), completion("abc")], [completion("four")]])
    assert (again.values_PG, again.parts) == (scores.values_PG, scores.parts)


def test_nothing_applies_is_no_score_and_no_failure(made):
    scores = score(made("def reward(completion): return None if completion == 'n' else 1.0"), "n", "y")
    assert same(scores.values_PG, [[math.nan, 1.0]]) and scores.unscored == 1
    assert scores.failed_share == 0 and not scores.failures


def test_no_completions(made):
    for source in ("def reward(completion): return 1", "def reward(completions): return [1]"):
        scores = made(source).score([prompt()], [[]])
        assert scores.values_PG == [[]] and scores.failed_share == 0


# -- finding it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("exat", "did you mean 'exact'"),
        ("rewads.py:good", "did you mean 'rewards.py'"),
        ("rewards.py:goood", "did you mean 'good'"),
        ("rewards.py:number", "int"),
        ("rewards.py:Klass", "cannot be made: RuntimeError: no licence"),
        ("rewards.py:unclear", "`completion`"),
        ("rewards.py:trainer", "trainer_state"),
        ("pakage.sub:f", "did you mean 'package'"),
        ("package.sob:f", "did you mean 'sub'"),
        ("package.sub:g", "there is: f"),
        ("broken.py:f", "SyntaxError"),
        ("needy:f", "No module named 'not_there_at_all'"),
    ],
)
def test_what_cannot_be_found_is_named_with_the_nearest(use, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards.py").write_text(
        "number = 3\n"
        "def good(completion): return 1\n"
        "def unclear(a, b): return 1\n"
        "def trainer(completions, trainer_state): return 1\n"
        "class Klass:\n    def __init__(self): raise RuntimeError('no licence')\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needy.py").write_text("import not_there_at_all\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "sub.py").write_text("def f(completion): return 1\n")
    with pytest.raises(UserError, match=re.escape(said)):
        build([RewardPart(use=use)], base=tmp_path)


@pytest.mark.parametrize(
    ("use", "args", "said"),
    [
        ("exact", {"anwser": "x"}, "did you mean 'answer'"),
        ("regex", {"pattern": "(a"}, "not a valid regular expression"),
        ("regex", {}, "lacks 'pattern'"),
        ("overlong", {"max_tokens": 4, "soft": 5}, "at most max_tokens"),
        ("length", {"unit": "words"}, "'tokens' or 'characters'"),
        ("math", {"deadline": 90.0}, "must be above its deadline"),
        ("number", {"tolerance": -1.0}, "0 or above"),
    ],
)
def test_bad_arguments_of_built_ins_are_refused(use, args, said):
    with pytest.raises(UserError, match=re.escape(said)):
        build([RewardPart(use=use, args=args)])


def test_names_weights_and_columns_are_checked():
    with pytest.raises(UserError, match="two rewards are called 'exact'"):
        build([RewardPart(use="exact"), RewardPart(use="exact")])
    with pytest.raises(UserError, match="metric of the whole reward"):
        build([RewardPart(use="exact", name="mean")])
    with pytest.raises(UserError, match="weight 0"):
        build([RewardPart(use="exact", weight=0.0)])
    reward = build([RewardPart(use="exact", args={"answer": "solution"})])
    reward.check_columns(["solution", "x"])
    with pytest.raises(UserError, match="did you mean 'solutions'"):
        reward.check_columns(["solutions"])


def test_a_file_may_import_its_neighbours_and_is_read_afresh(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 4.0\n")
    (tmp_path / "r.py").write_text("import neighbour_of_mine\ndef f(completion): return neighbour_of_mine.VALUE\n")
    assert score(build([RewardPart(use="r.py:f")], base=tmp_path), "x").values_PG == [[4.0]]
    (tmp_path / "r.py").write_text("def f(completion): return 55.0  # a longer file\n")
    assert score(build([RewardPart(use="r.py:f")], base=tmp_path), "x").values_PG == [[55.0]]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero (mine0.py:1)"),
        ("exit()", "SystemExit"),
        ("float('nan')", "returned nan"),
        ("float('inf')", "returned inf"),
        ("10**400", "returned inf"),
        ("'0.5'", "returned a str ('0.5'), not a number"),
        ("object", "not a number"),
        ("{}", "empty dict"),
        ("[]", "empty list"),
        ("{'a': float('nan')}", "'a' is nan"),
        ("[1.0, 'x']", "step 1 is a str"),
        ("later()", "declare the function itself `async def`"),
    ],
)
def test_a_bad_score_fails_its_sample_alone(returned, reason, made):
    reward = made(f"def reward(completion): return {returned} if completion == 'bad' else 1.0\nasync def later(): pass")
    scores = score(reward, "a", "bad", "b")
    assert same(scores.values_PG, [[1.0, math.nan, 1.0]]) and same(scores.parts["reward"], [[1.0, math.nan, 1.0]])
    (failure,) = scores.failures
    assert (failure.part, failure.prompt_index, failure.sample) == ("reward", 0, 1) and reason in failure.reason
    assert scores.failed_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("returned", "reason", "failed"),
    [
        ("[1.0, 2.0]", "2 scores for 3 completions", 3),
        ("[1.0] * 4", "4 scores for 3 completions", 3),
        ("1.0", "a float (1.0), not a list of 3 scores", 3),
        ("{'a': [1.0, 2.0, 3.0], 'b': [1.0]}", "under 'b' 1 scores", 3),
        ("[][0]", "IndexError", 3),
        ("None", "a NoneType", 3),
        ("[1.0, float('nan'), 1.0]", "returned nan", 1),
        ("[1.0, 'x', 1.0]", "a str ('x')", 1),
    ],
)
def test_a_bad_batch_fails_as_much_as_it_must(returned, reason, failed, made):
    scores = score(made(f"def reward(completions): return {returned}"), "a", "b", "c")
    assert len(scores.failures) == failed and all(reason in f.reason for f in scores.failures)
    assert sum(map(math.isnan, scores.values_PG[0])) == failed and scores.failed_share == failed / 3


def test_a_failed_part_fails_the_sum_unless_it_is_only_recorded(tmp_path):
    (tmp_path / "m.py").write_text("def bad(completion): raise KeyError('k')\ndef good(completion): return 1.0\n")
    parts = [RewardPart(use="m.py:bad", weight=0.0), RewardPart(use="m.py:good")]
    scores = score(build(parts, base=tmp_path), "x")
    assert scores.values_PG == [[1.0]] and scores.failed_share == 1.0
    parts[0] = RewardPart(use="m.py:bad")
    assert same(score(build(parts, base=tmp_path), "x").values_PG, [[math.nan]])


HANG = "import time\ndef reward(completion):\n    if completion == 'hang':\n        time.sleep(60)\n    return 1.0\n"


def test_a_hang_fails_its_sample_and_the_rest_go_on(made):
    reward = made(HANG, timeout=0.2)
    began = time.monotonic()
    scores = score(reward, "a", "hang", "b")
    assert time.monotonic() - began < 2 and same(scores.values_PG, [[1.0, math.nan, 1.0]])
    (failure,) = scores.failures
    assert (
        failure.reason == "timeout: had not returned after 0.2 s at mine0.py:4"
        and "time.sleep(60)" in failure.traceback
    )
    assert score(reward, "a").values_PG == [[1.0]]


def test_after_three_hangs_the_rest_fail_at_once(made):
    began = time.monotonic()
    scores = score(made(HANG, timeout=0.2), "a", *["hang"] * 50, "b")
    assert time.monotonic() - began < 3 and scores.failed_share == 51 / 52 and scores.values_PG[0][0] == 1.0
    assert scores.failures[-1].reason.startswith("not called: 3 calls")


def test_a_batch_hang_fails_the_batch(made):
    scores = score(made("import time\ndef reward(completions): time.sleep(60)", timeout=0.2), "a", "b")
    assert scores.failed_share == 1 and all(f.reason.startswith("timeout") for f in scores.failures)


def test_async_timeouts_cancel_the_call_and_a_blocked_loop_is_left(made):
    source = """
        import asyncio, time
        async def reward(completion):
            if completion == "wait":
                await asyncio.sleep(60)
            if completion == "own":
                raise TimeoutError("the server's")
            if completion == "block":
                time.sleep(4)
            return 1.0
    """
    reward = made(source, timeout=0.2)
    scores = score(reward, "a", "wait", "own", "b")
    assert same(scores.values_PG, [[1.0, math.nan, math.nan, 1.0]])
    assert [f.reason.split(" (")[0] for f in scores.failures] == [
        "timeout: had not returned after 0.2 s",
        "TimeoutError: the server's",
    ]
    scores = score(reward, "a", "block", "b")
    assert scores.values_PG[0][0] == 1.0 and "blocked its event loop" in scores.failures[0].reason
    assert score(reward, "a").values_PG == [[1.0]]


def test_a_missing_column_is_named(made):
    scores = score(made("def reward(completion, answer): return 1.0"), "x", anwser="4")
    assert scores.failures[0].reason == "needs the column 'answer'; did you mean 'anwser'?"


def test_check_failures_says_which_how_many_why_and_what_to_do(made):
    reward = made("def inverse(completion): return 1 / len(completion)", "inverse")
    scores = reward.score([prompt(5), prompt(9)], [[completion("x")] * 3, [completion("")] + [completion("x")] * 6])
    check_failures(scores, 0.1)  # 1 of 10 is within a tenth
    with pytest.raises(RewardError) as caught:
        check_failures(scores, 0.05)
    message = str(caught.value)
    for said in (
        "'inverse' failed on 1 of 10",
        "10.0%",
        "5.0%",
        "prompt 9, sample 0",
        "ZeroDivisionError",
        "max_reward_failures",
    ):
        assert said in message
    assert "return 1 / len(completion)" in caught.value.traceback
    assert "truecourse" not in caught.value.traceback.replace(str(Path(__file__)), "")
    with pytest.raises(RewardError, match="raise `timeout`"):
        check_failures(score(made(HANG, timeout=0.1), "hang"), 0.0)


def test_check_failures_names_the_part_that_failed_most(tmp_path):
    (tmp_path / "m.py").write_text(
        "def few(completion): return {'a': float('nan') if completion == 'x' else 1.0}\ndef many(completion): 1 / 0\n"
    )
    scores = score(build([RewardPart(use="m.py:few"), RewardPart(use="m.py:many")], base=tmp_path), "x", "y")
    assert same(scores.parts["few"], [[math.nan, 1.0]]) and same(scores.parts["few/a"], [[math.nan, 1.0]])
    with pytest.raises(RewardError, match="'many' failed on 2 of 2"):
        check_failures(scores, 0.0)


def test_an_interrupt_inside_a_reward_interrupts_and_a_cancelled_client_only_fails(made):
    with pytest.raises(KeyboardInterrupt):
        score(made("def reward(completion): raise KeyboardInterrupt"), "x")
    cancelled = made("import asyncio\nasync def reward(completion): raise asyncio.CancelledError", timeout=5.0)
    began = time.monotonic()
    assert "CancelledError" in score(cancelled, "x").failures[0].reason and time.monotonic() - began < 2


def test_two_parts_from_one_file_share_it(tmp_path):
    (tmp_path / "m.py").write_text(
        "n = [0]\ndef a(completion): n[0] += 1; return n[0]\ndef b(completion): n[0] += 1; return n[0]\n"
    )
    reward = build([RewardPart(use="m.py:a"), RewardPart(use="m.py:b")], base=tmp_path)
    assert score(reward, "x", "y").parts == {"a": [[1.0, 2.0]], "b": [[3.0, 4.0]]}


def test_interrupt_passes_through_promptly(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef reward(completion): time.sleep(60)\n")
    (tmp_path / "main.py").write_text(
        "from truecourse.rewards import build\nfrom truecourse.recipe import RewardPart\n"
        "from truecourse.data.sequences import Completion, Prompt\n"
        "reward = build([RewardPart(use='slow.py:reward')])\nprint('ready', flush=True)\n"
        "try:\n    reward.score([Prompt(0, 'x', (1,), {})], [[Completion((1,), (0.0,), 'eos', 0, 'y')]])\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n" and process.returncode == 0
    assert time.monotonic() - began < 5


# -- verifiers --------------------------------------------------------------------------------------------------------


def test_exact():
    def values(args, *texts, **row):
        return score(build([RewardPart(use="exact", args=args)]), *texts, **row).values_PG[0]

    assert values({}, " 42\n", "42.", "", answer=42) == [1, 0, 0]
    assert values({"strip": False}, " 42", "42", answer="42") == [0, 1]
    assert values({"case": False, "answer": "gold"}, "Oui", "OUI", "non", gold=["oui", "yes"]) == [1, 1, 0]
    assert values({}, "18", answer=18.0) == [1]
    assert math.isnan(values({}, "x", answer=None)[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 16 - 7 = 9", 9),
        ("10-5", 5),
        ("x = -5", -5),
        ("−3", -3),
        ("costs $1,234.50.", Fraction("1234.5")),
        ("-$5", -5),
        ("$-5", -5),
        ("it is 3/4 of it", Fraction(3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("18.", 18),
        ("50%", 50),
        ("1{,}234", 1234),
        ("1,2,3", 3),
        ("#### -12\nsee step 4", -12),
        ("#### Step 1\nso 18", 18),
        (r"\boxed{7} as in step 3", 7),
        (r"\boxed{7} and \boxed{x = 8}, step 3", 8),
        ("1/0", None),
        ("no", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_number_that_a_text_ends_on(text, number):
    assert answers.last_number(text) == number


def test_number():
    number = Number(tolerance=0.01)
    assert number.score("about 0.33", answer="1/3") == 1 and number.score("0.3", answer="1/3") == 0
    assert Number().score("1000001", answer="1,000,000") == 0
    assert Number().score("#### 18", answer="9 * 2 = <<9*2=18>>18\n#### 18") == 1
    with pytest.raises(UserError, match="holds no number"):
        Number().score("1", answer="none")


def test_length_and_overlong():
    group = [completion("ab" * n, n) for n in (1, 6, 8, 10, 12)]
    parts = [
        RewardPart(use="overlong", args={"max_tokens": 10, "soft": 4}),
        RewardPart(use="length", args={"target": 7, "slope": 0.5}),
        RewardPart(use="length", name="around", args={"target": 7, "slope": 0.5, "both": True}),
        RewardPart(use="length", name="characters", args={"slope": 1.0, "unit": "characters"}),
    ]
    scores = build(parts).score([prompt()], [group])
    assert scores.parts["overlong"] == [[0.0, 0.0, -0.5, -1.0, -1.0]]
    assert scores.parts["length"] == [[0.0, 0.0, -0.5, -1.5, -2.5]]
    assert scores.parts["around"] == [[-3.0, -0.5, -0.5, -1.5, -2.5]]
    assert scores.parts["characters"] == [[-2.0, -12.0, -16.0, -20.0, -24.0]]
    halved = build(parts[1:2], tokens_of=lambda c: c.tokens[::2]).score([prompt()], [group])
    assert halved.parts["length"] == [[0.0] * 5]


def test_overlong_agrees_with_trl():
    peer = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(max_completion_len=9, soft_punish_cache=5)
    group = [completion("", n) for n in range(1, 15)]
    mine = build([RewardPart(use="overlong", args={"max_tokens": 9, "soft": 5})]).score([prompt()], [group])
    assert mine.values_PG[0] == pytest.approx(peer(completion_ids=[c.tokens for c in group]))


def test_regex_matches_and_a_catastrophic_one_is_ended():
    regex = Regex(r"\d+$")
    assert [regex.score(t, lambda *_: None) for t in ("a 1", "1 a")] == [1, 0]
    assert Regex(r"\d+", fullmatch=True).score("a 1", lambda *_: None) == 0
    reward = build([RewardPart(use="regex", args={"pattern": r"(a+)+$", "deadline": 0.1})])
    began = time.monotonic()
    scores = score(reward, "a" * 40 + "b", "aaa")
    assert time.monotonic() - began < 10 and scores.values_PG == [[0.0, 1.0]] and scores.notes == {"regex/timeout": 0.5}
    reward.close()


PAIRS = [
    ("1/2", r"so \boxed{\frac{1}{2}}", 1),
    ("0.5", r"\boxed{1/2}", 1),
    ("x^2+2x+1", "$(x+1)^2$", 1),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
    ("(1,2)", r"\boxed{(2,1)}", 0),
    ("1000", "We get 1,000.", 1),
    ("Tuesday", r"\boxed{\text{tuesday}}", 1),
    ("Tuesday", r"\boxed{Monday}", 0),
    ("C", r"\boxed{(C)}", 1),
    ("C", r"\boxed{D}", 0),
    ("18", "The answer is 18 apples.", 1),
    ("9 * 2 = 18\n#### 18", "so\n#### 18", 1),
    ("18", "**Final Answer: 18**", 1),
    ("18", "#### Step 3: add 5\nso 18", 1),
    ("18", "Let a: 5\nso 18", 1),
    ("x=5", r"\boxed{5}", 1),
    (r"\pi/4", r"\boxed{\frac{\pi}{4}}", 1),
    ("-3", r"\boxed{3}", 0),
    ("sqrt(2)", r"\boxed{\sqrt{2}}", 1),
    ("2*sqrt(2)", r"\boxed{2}", 0),
    (r"1\frac{1}{2}", r"\boxed{3/2}", 1),
    ("Tuesday", "so\nAnswer: Tuesday.", 1),
    ("7", r"\boxed{5} no, \boxed{7}", 1),
    ("18", r"\boxed{17, 18}", 0),
    ("18", r"\boxed{17 \text{ or } 18}", 0),
    ("18", r"\boxed{17} \boxed{18} \boxed{17}", 0),
    ("18", "", 0),
    (r"\sin^2 x+\cos^2 x", r"\boxed{1}", 1),
]


def test_math_sees_through_equivalent_forms():
    verify = Math()
    verdicts = {(gold, said): verify.score(said, lambda *_: None, answer=gold) for gold, said, _ in PAIRS}
    assert verdicts == {(gold, said): right for gold, said, right in PAIRS}
    with pytest.raises(UserError, match="empty"):
        verify.score("1", lambda *_: None, answer=" ")
    verify.close()


def test_math_remembers_verdicts_and_counts_what_ran_out_of_memory_as_wrong():
    class Replies:
        asked = 0

        def ask(self, gold, answer):
            self.asked += 1
            return {"error": "MemoryError"} if "y" in answer else True

    verify, notes = Math(), []
    verify.checker = Replies()
    said = [r"\boxed{x}", r"\boxed{y}", "so \\boxed{x}", "so \\boxed{y}"]
    assert [verify.score(t, lambda *n: notes.append(n), answer="z") for t in said] == [1, 0, 1, 0]
    assert verify.checker.asked == 2 and notes.count(("error", 1.0)) == 2 and ("timeout", 1.0) not in notes
    verify.checker = Checker("math", 1.0)
    verify.close()


def test_the_fast_path_for_numbers_agrees_with_math_verify():
    draw, checker = random.Random(0), Checker("math", 5.0)

    def number() -> str:
        whole, decimal = str(draw.randint(-20, 20)), f"{draw.randint(-5, 5)}.{draw.randint(0, 99):02d}"
        return draw.choice([whole, decimal, f"{draw.randint(1, 9)}/{draw.randint(1, 9)}", f"{draw.randint(1, 9)},000"])

    for _ in range(150):
        a = number()
        b = draw.choice([a, number(), a + ("" if re.search("[./]", a) else ".0")])
        x, y = answers.plain_number(a), answers.plain_number(b)
        assert x is not None and y is not None
        slow = checker.ask(gold=answers.to_latex(a), answer=answers.to_latex(b))
        assert (x == y or round(x, 6) == round(y, 6)) == slow, (a, b)
    checker.close()


def hostile(draw: random.Random) -> str:
    n = draw.choice([20, 200, 3000])
    return draw.choice(
        [
            lambda: r"\boxed{" + "(" * n + "1" + ")" * n + "}",
            lambda: r"\boxed{10^{10^{10}}}",
            lambda: r"\boxed{9" + "!" * draw.randint(2, 6) + "}",
            lambda: r"\boxed{" + "^".join(["{9}"] * draw.randint(3, 9)) + "}",
            lambda: r"\boxed{" + r"\frac{1}{" * n + "2" + "}" * n + "}",
            lambda: r"\boxed{" + r"\sqrt{" * n + "2" + "}" * n + "}",
            lambda: "".join(draw.choice("abc123$\\{}()[]^_+-*/=,. ") for _ in range(n)),
            lambda: r"\boxed{" * n,
            lambda: "1,111" * n + "####" * n + "* _" * n,
            lambda: "$" + "+".join(f"x^{{{i}}}" for i in range(n)) + "$",
            lambda: r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k}}",
            lambda: rf"\boxed{{\int_0^1 e^{{-x^{{{n}}}}}\sin(x^x) dx}}",
            lambda: rf"\boxed{{10**10**{n}}}",
            lambda: "7" * 20 * n,
        ]
    )()


def test_two_hundred_hostile_answers_take_a_bounded_time_and_none_passes_or_fails():
    draw = random.Random(0)
    reward = build([RewardPart(use="math", args={"deadline": 0.05}), RewardPart(use="number")])
    prompts = [prompt(i, answer=draw.choice(["1/7", r"\frac{x^2}{3}", r"\sqrt{2}/5"])) for i in range(50)]
    began = time.process_time(), time.monotonic()
    scores = reward.score(prompts, [[completion(hostile(draw)) for _ in range(4)] for _ in prompts])
    assert time.monotonic() - began[1] < 120  # some 80 of them hang; about 10 s on a quiet machine
    math_failures = [f for f in scores.failures if f.part == "math"]
    assert not math_failures and sum(v or 0 for row in scores.parts["math"] for v in row) == 0
    assert 0.2 < scores.notes["math/timeout"] < 0.8
    reward.close()


def test_a_check_that_hangs_is_ended_and_the_next_is_answered():
    checker = Checker("math", 0.3)
    assert checker.ask(gold=r"\boxed{2}", answer=r"\boxed{1+1}") is True
    began = time.monotonic()
    with pytest.raises(Deadline):
        checker.ask(gold=r"\boxed{2}", answer=r"\boxed{9!!!!}")
    restart = time.monotonic()
    assert checker.ask(gold=r"\boxed{2}", answer=r"\boxed{\frac{4}{2}}") is True
    assert restart - began < 5 and time.monotonic() - restart < 2
    checker.close()


def test_a_killed_checker_is_a_failure_and_comes_back():
    reward = build([RewardPart(use="math")])
    verify = reward._parts[0].target
    assert score(reward, r"\boxed{\frac{2}{4}x}", answer="x/2").values_PG == [[1.0]]
    os.killpg(verify.checker._process.pid, signal.SIGKILL)
    scores = score(reward, r"\boxed{\frac{3}{6}x}", answer="x/2")
    assert "the checking process ended" in scores.failures[0].reason
    assert score(reward, r"\boxed{\frac{3}{6}x}", answer="x/2").values_PG == [[1.0]]
    reward.close()


def test_an_answer_never_meets_another_question():
    checker = Checker("regex", 5.0, pattern="a", fullmatch=False)
    assert checker.ask(text="a") is True
    pid = checker._process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.is_file():
        pytest.skip("no /proc: the fork's id cannot be found")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)  # while idle, as out of memory
    with pytest.raises(CheckerCrash, match="SIGKILL"):
        checker.ask(text="a")
    assert [checker.ask(text=t) for t in ("b", "a", "b")] == [False, True, False]
    checker.close()


def test_a_checker_that_cannot_start_says_why():
    checker = Checker("regex", 1.0, patern="x")  # the child's function takes `pattern`
    with pytest.raises(CheckerCrash, match="patern"):
        checker.ask(text="x")


def test_gsm8k_verdicts_agree_with_the_published_ones(shared_data):
    path = shared_data / "gsm8k" / "model_solutions_first200.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    models = [key for key, value in rows[0].items() if isinstance(value, dict)]
    prompts = [prompt(i, row["question"], answer=row["ground_truth"]) for i, row in enumerate(rows)]
    reward = build([RewardPart(use="math"), RewardPart(use="number")])
    scores = reward.score(prompts, [[completion(row[m]["solution"]) for m in models] for row in rows])
    published = [[float(row[m]["is_correct"]) for m in models] for row in rows]
    assert not scores.failures and scores.parts == {"math": published, "number": published}
    reward.close()
