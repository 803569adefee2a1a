"""Sampling: against `model.generate`, the naive forward, exact distributions and brute force."""

import copy
import random
from functools import cache

import numpy as np
import peft
import pytest
import torch
import transformers
from scipy import stats
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from truecourse.data.sequences import Batch, Prompt
from truecourse.errors import UserError
from truecourse.model import attention
from truecourse.model.logprobs import head_of, score
from truecourse.recipe import Sampling
from truecourse.rollout import decoding
from truecourse.rollout.local import LocalEngine
from truecourse.rollout.sampler import StopStrings, draw
from truecourse.rollout.streams import LARGEST, uniforms

transformers.logging.set_verbosity_error()
FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2")
VOCAB, END, CONTEXT = 64, 7, 256


@cache
def family(name: str, vocab: int = VOCAB):
    """A random tiny model, sharpened so that the likeliest token leads clearly; windows shorter than the sequences."""
    torch.manual_seed(0)
    common = {
        "vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=5))
    elif name == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0}
        model = Gemma2ForCausalLM(
            Gemma2Config(**common, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, **caps)
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2,
                resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
        model.get_output_embeddings().weight.mul_(1 if vocab == VOCAB or model.config.tie_word_embeddings else 3)
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def prompts_of(lengths, vocab: int = VOCAB) -> list[Prompt]:
    draw = random.Random(1)
    return [Prompt(i, "", tuple(draw.randrange(vocab) for _ in range(n))) for i, n in enumerate(lengths)]


RAGGED = prompts_of([3, 90, 2, 7, 31, 7, 88, 1, 30, 5])


def spell(tokens) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def engine_for(model, ends=(), **options) -> LocalEngine:
    return LocalEngine(model, ends, spell, **options)


def own_attention(model):
    """The model's own forward: eager attention while inside."""

    class Switch:
        def __enter__(self):
            model.set_attn_implementation("eager")

        def __exit__(self, *_):
            model.set_attn_implementation(attention.NAME)

    return Switch()


def generated(model, prompt: Prompt, max_tokens: int, end: int | None) -> tuple[int, ...]:
    with own_attention(model), torch.no_grad():
        tokens = torch.tensor([prompt.tokens])
        seen = torch.ones_like(tokens)  # otherwise it takes every 0 in the prompt for padding
        out = model.generate(
            tokens, attention_mask=seen, max_new_tokens=max_tokens, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    return tuple(out[0, len(prompt.tokens) :].tolist())


def naive_logps(model, prompt: Prompt, tokens, temperature: float) -> torch.Tensor:
    with own_attention(model), torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.tokens, *tokens]])).logits[0, len(prompt.tokens) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def furthest(model, prompts, out, temperature: float) -> float:
    """Largest distance (nats) between the sampler's log-probs and the naive forward's."""
    return max(
        float((naive_logps(model, p, c.tokens, temperature) - torch.tensor(c.logps)).abs().max())
        for p, group in zip(prompts, out)
        for c in group
    )


def same(a, b) -> bool:
    """The same tokens and reasons; log-probs to rounding, since other batches add up in another order."""
    for x, y in zip((c for g in a for c in g), (c for g in b for c in g), strict=True):
        if (x.tokens, x.stop, x.text) != (y.tokens, y.stop, y.text) or not np.allclose(x.logps, y.logps, atol=1e-4):
            return False
    return True


# -- greedy = generate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_generate_token_for_token(name, lora):
    model = family(name)
    if lora:
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name == "gpt2"
        )
        model = peft.get_peft_model(copy.deepcopy(model), config).get_base_model().eval()
    free = [generated(model, p, 24, None) for p in RAGGED]
    assert len({t for tokens in free for t in tokens}) > 10, "degenerate: every completion repeats one token"
    end = free[0][11]  # so that some completions do end
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in free]
    assert expected[0] == generated(model, RAGGED[0], 24, end) != free[0]
    assert {len(tokens) == 24 for tokens in expected} == {True, False}
    for options in ({}, {"max_rows": 3}, {"packed": False}):
        if not options.get("packed", True):
            model.set_attn_implementation("eager")
        out = engine_for(model, [end], **options).generate(RAGGED, 2, Sampling(max_tokens=24, temperature=0), (0,))
        model.set_attn_implementation(attention.NAME)
        assert [c.tokens for group in out for c in group] == [tokens for tokens in expected for _ in range(2)]
        stops = ["eos" if tokens[-1] == end else "length" for tokens in expected for _ in range(2)]
        assert [c.stop for group in out for c in group] == stops
        assert furthest(model, RAGGED, out, 1.0) < 1e-4  # greedy reports the distribution at temperature 1


def test_the_published_story(shared_data):
    folder = str(shared_data / "stories260K")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME).eval()
    engine = LocalEngine(model, [], lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    ((story,),) = engine.generate([Prompt(0, "", (1,))], 1, Sampling(max_tokens=200, temperature=0), (0,))
    assert len(story.tokens) == 200
    assert story.text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


# -- log-probs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_logps_are_the_trainers(name):
    model = family(name)
    sampling = Sampling(max_tokens=20, temperature=0.7)
    out = engine_for(model, [END], max_rows=12).generate(RAGGED, 3, sampling, (0, 1))
    assert len({c.tokens for group in out for c in group}) > 20
    assert furthest(model, RAGGED, out, 0.7) < 1e-4
    completions = [c for group in out for c in group]
    batch = Batch([p.tokens for p in RAGGED], [c.tokens for c in completions], [i for i in range(10) for _ in range(3)])
    with torch.no_grad():
        trainers = score(model, head_of(model), batch, 0.7).logp_T
    assert (trainers - torch.tensor([x for c in completions for x in c.logps])).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_position_off_by_one_is_seen(name, monkeypatch):
    honest = decoding.SharedPrompts.add

    def shifted(self, groups):
        logits = honest(self, groups)
        self.positions_B = self.positions_B + torch.arange(len(self.positions_B)) % 2
        return logits

    monkeypatch.setattr(decoding.SharedPrompts, "add", shifted)
    out = engine_for(family(name)).generate(RAGGED, 1, Sampling(max_tokens=20), (0,))
    # rotary positions are relative: a shifted row sees its prompt one token further away
    assert furthest(family(name), RAGGED, out, 1.0) > 1e-2


@pytest.mark.parametrize("rule", ["window", "softcap", "scaling"])
def test_a_neglected_rule_is_seen(rule, monkeypatch):
    honest = decoding._Cohort.attend

    def careless(self, layer, q, k, v, rules):
        wrong = {"window": None, "softcap": None, "scaling": 2 * (rules.scaling or 1)}[rule]
        return honest(self, layer, q, k, v, attention.Rules(**{**vars(rules), rule: wrong}))

    monkeypatch.setattr(decoding._Cohort, "attend", careless)
    out = engine_for(family("gemma2")).generate(RAGGED, 1, Sampling(max_tokens=20), (0,))
    assert furthest(family("gemma2"), RAGGED, out, 1.0) > 1e-3


# -- what a request's result may depend on -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_results_do_not_depend_on_the_batch(name, monkeypatch):
    model = family(name)
    prompts, sampling = prompts_of([(7 * i) % 50 + 1 for i in range(20)]), Sampling(max_tokens=16)
    reference = engine_for(model, [END]).generate(prompts, 2, sampling, (3, 5))
    lengths = {len(c.tokens) for group in reference for c in group}
    assert len(lengths) > 5, "ragged lengths wanted"
    for max_rows in (3, 17):
        assert same(reference, engine_for(model, [END], max_rows=max_rows).generate(prompts, 2, sampling, (3, 5)))
    backward = engine_for(model, [END], max_rows=7).generate(prompts[::-1], 2, sampling, (3, 5))
    assert same(reference, backward[::-1])
    assert same(reference[4:5], engine_for(model, [END]).generate(prompts[4:5], 2, sampling, (3, 5)))
    assert same([g[:1] for g in reference], engine_for(model, [END]).generate(prompts, 1, sampling, (3, 5)))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 60)
    assert same(reference, engine_for(model, [END]).generate(prompts, 2, sampling, (3, 5)))
    assert not same(reference, engine_for(model, [END]).generate(prompts, 2, sampling, (3, 6)))


def test_a_shared_prompt_is_a_repeated_prompt():
    """Each completion alone, behind its own copy of the prompt, is what the group got."""
    model, prompt = family("qwen3"), RAGGED[4]
    (group,) = engine_for(model).generate([prompt], 6, Sampling(max_tokens=15), (9,))
    for tokens, logps in ((c.tokens, c.logps) for c in group):
        assert torch.allclose(naive_logps(model, prompt, tokens, 1.0), torch.tensor(logps), atol=1e-4)
    repeated = engine_for(model, max_rows=1).generate([prompt], 6, Sampling(max_tokens=15), (9,))
    assert same([group], repeated)
    assert len({c.tokens for c in group}) == 6


def test_own_keys_are_moved_grown_and_masked_as_rows_come_and_go(monkeypatch):
    monkeypatch.setattr(decoding, "FIRST_COLUMNS", 4)
    rebuilt = []
    honest = decoding._Cohort._rebuild

    def watched(self):
        honest(self)
        rebuilt.append((self.width, self.columns, max(self.start)))

    monkeypatch.setattr(decoding._Cohort, "_rebuild", watched)
    prompts, sampling = prompts_of([4, 30, 9, 12, 20, 2, 6, 25, 14, 3, 8, 17]), Sampling(max_tokens=60)
    for name in ("mistral", "qwen3"):
        rebuilt.clear()
        model = family(name)
        out = engine_for(model, [END], max_rows=3).generate(prompts, 1, sampling, (0,))
        lengths = [len(c.tokens) for (c,) in out]
        assert max(lengths) == 60 and min(lengths) < 30
        assert furthest(model, prompts, out, 1.0) < 1e-4
        assert same(out, engine_for(model, [END]).generate(prompts, 1, sampling, (0,)))
        assert {columns for _, columns, _ in rebuilt} >= {4, 8, 16, 32} and max(
            columns for _, columns, _ in rebuilt
        ) <= 74
        assert any(start > 0 for _, _, start in rebuilt)
        assert len(rebuilt) < 60, "columns are moved too often"


def test_the_same_arguments_give_the_same_bits():
    engine = engine_for(family("llama"), [END], max_rows=5)
    first, second = (engine.generate(RAGGED, 3, Sampling(max_tokens=20, top_p=0.9), (1,)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", FAMILIES)
def test_the_padded_path_gives_the_same(name):
    model, sampling = family(name), Sampling(max_tokens=20, temperature=1.2)
    packed = engine_for(model, [END]).generate(RAGGED, 2, sampling, (4,))
    model.set_attn_implementation("eager")
    try:
        padded = engine_for(model, [END], packed=False, max_rows=6).generate(RAGGED, 2, sampling, (4,))
    finally:
        model.set_attn_implementation(attention.NAME)
    assert same(packed, padded)


# -- the distribution --------------------------------------------------------------------------------------------------


def truncated(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """By the definition: the k likeliest, then the smallest set of those that holds top_p; renormalised."""
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    share = p[kept] / p[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(share), top_p - 1e-9)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8, "temperature": 1.5}]
)
def test_frequencies_match_the_exact_distribution(settings):
    """Two tokens over 8 words: all 64 pairs enumerated, 20,000 sampled."""
    model, prompt, n = family("llama", vocab=8), Prompt(0, "", (1, 2, 3)), 20_000
    sampling = Sampling(max_tokens=2, **settings)
    (group,) = engine_for(model, max_rows=n).generate([prompt], n, sampling, (0,))
    with own_attention(model), torch.no_grad():
        rows = torch.tensor([[*prompt.tokens, t] for t in range(8)])
        logits = model(input_ids=rows).logits / sampling.temperature
    first = truncated(logits[0, -2].softmax(-1).double().numpy(), sampling.top_k, sampling.top_p)
    then = np.stack(
        [truncated(row.softmax(-1).double().numpy(), sampling.top_k, sampling.top_p) for row in logits[:, -1]]
    )
    exact = first[:, None] * then
    counts = np.zeros((8, 8))
    pairs = np.array([c.tokens for c in group]).T
    np.add.at(counts, tuple(pairs), 1)
    logps = np.log(np.stack([first[pairs[0]], then[tuple(pairs)]], 1))
    assert np.allclose(np.array([c.logps for c in group]), logps, atol=1e-4)
    assert counts[exact == 0].sum() == 0

    def p_value(expected):
        likely = expected.ravel() * n >= 5
        observed = [*counts.ravel()[likely], counts.ravel()[~likely].sum()]
        wanted = [*expected.ravel()[likely] * n, expected.ravel()[~likely].sum() * n]
        return stats.chisquare(
            *(x[:-1] if wanted[-1] < 1e-6 else x for x in (observed, wanted)), sum_check=False
        ).pvalue

    assert p_value(exact) > 1e-3
    flatter = 0.95 * exact + 0.05 * (exact > 0) / (exact > 0).sum()
    assert p_value(flatter) < 1e-3, "the test could not tell 5 % of uniform noise"


def test_no_token_of_probability_zero_is_ever_drawn():
    logits = torch.tensor(
        [[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf], [2.0, -torch.inf, -200.0, -torch.inf, -torch.inf]]
    )
    for u in (0.0, 1e-9, 0.25, 0.5, float(LARGEST)):
        for settings in ({}, {"top_p": 0.999}, {"top_k": 4}):
            tokens, logps = draw(logits, torch.full((2,), u), Sampling(**settings))
            assert tokens[0] in (1, 3) and tokens[1] == 0
            assert torch.isfinite(logps).all()
    for scale in (0.5, 0.75, 0.9999999, 1.0, 1.0000001, 1.5):  # why LARGEST is what it is: the product rounds below
        total = np.float32(scale)
        assert np.float32(LARGEST * total) < total


def test_streams_are_uniform_distinct_and_begin_alike():
    u = uniforms((0, 3), 5, 1, 50_000)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() <= LARGEST
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert (uniforms((0, 3), 5, 1, 10) == u[:10]).all()
    others = [uniforms(*name, 10) for name in (((0, 3), 1, 5), ((0,), 3, 5), ((3, 0), 5, 1), ((0, 3), 5, 2))]
    assert all((x != u[:10]).all() for x in others)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_several_end_ids_belong_to_the_completion_and_not_to_its_text():
    out = engine_for(family("llama"), [3, 11, 40]).generate(RAGGED, 4, Sampling(max_tokens=60), (2,))
    ended = [c for group in out for c in group if c.stop == "eos"]
    assert {c.tokens[-1] for c in ended} == {3, 11, 40}
    for c in ended:
        assert not {3, 11, 40} & set(c.tokens[:-1]) and c.text == spell(c.tokens[:-1])
        assert len(c.logps) == len(c.tokens)


@pytest.mark.parametrize("packed", [True, False])
def test_stop_strings_cut_the_text_and_leave_the_tokens(packed):
    model = family("llama")
    free = engine_for(model).generate(RAGGED, 4, Sampling(max_tokens=40), (2,))
    strings = (free[0][0].text[4:7], free[3][1].text[10:12])  # three tokens, two tokens
    if not packed:
        model.set_attn_implementation("eager")
    try:
        out = engine_for(model, packed=packed, max_rows=16).generate(
            RAGGED, 4, Sampling(max_tokens=40, stop=strings), (2,)
        )
    finally:
        model.set_attn_implementation(attention.NAME)
    stopped = 0
    for a, b in zip((c for g in free for c in g), (c for g in out for c in g)):
        ends = [a.text.find(s) + len(s) for s in strings if s in a.text]
        length = min(ends, default=len(a.tokens))
        assert b.tokens == a.tokens[:length]
        assert b.stop == ("stop" if ends else "length")
        assert b.text == (min((a.text[:length].split(s)[0] for s in strings), key=len) if ends else a.text)
        stopped += bool(ends)
    assert 2 <= stopped < 40


def bytes_of(tokens) -> str:
    """One byte a token: a character outside ASCII is cut between tokens."""
    return bytes(tokens).decode("utf-8", errors="replace")


PIECES = ["a", "b", " a", " b", "ab", "ba b", "", "   ", "aab", "é", "\n\n", "a\nb"]


def pieces_of(tokens) -> str:
    """Pieces of several characters, one of them silent; the text's leading space is dropped, as SentencePiece does."""
    return "".join(PIECES[t] for t in tokens).removeprefix(" ")


def test_stop_strings_agree_with_decoding_everything():
    draw = random.Random(0)
    text = "né ab£ba\n£" * 3
    alphabets = [(bytes_of, list(text.encode())), (pieces_of, range(len(PIECES)))]
    candidates = ["é", "£b", " ab", "ab ", "b\n", "aba", "a b a", "\n\n", "ab£ba\n£né", "bb  a"]
    hits = 0
    for trial in range(1500):
        decode, alphabet = alphabets[trial % 2]
        tokens = draw.choices(list(alphabet), k=draw.choice([5, 30, 120]))
        strings = draw.sample(candidates, draw.choice([1, 2]))
        expected = next(
            ((n, min(decode(tokens[:n]).find(s) for s in strings if s in decode(tokens[:n])))
             for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in strings)),
            None,
        )  # fmt: skip
        stops, tail, got = StopStrings(strings, decode), 0, None
        for n in range(1, len(tokens) + 1):
            cut, tail = stops.cut(tokens[:n], tail)
            if cut is not None:
                got = n, cut
                break
        assert got == expected, (strings, decode(tokens))
        hits += got is not None
    assert 300 < hits < 1400


def test_stop_strings_decode_only_a_tail():
    lengths = []

    def decode(tokens):
        lengths.append(len(tokens))
        return bytes_of(tokens)

    stops, tail, tokens = StopStrings(["xyz"], decode), 0, []
    for _ in range(2000):
        tokens.append(ord("z"))
        cut, tail = stops.cut(tokens, tail)
        assert cut is None
    assert max(lengths) < 50


# -- manners -----------------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused_by_row():
    prompts = prompts_of([5, 200])
    engine = engine_for(family("gpt2"))
    with pytest.raises(UserError, match=r"row 1: .*200 tokens and max_tokens = 100 .*256 tokens; .*at most 56"):
        engine.generate(prompts, 1, Sampling(max_tokens=100), (0,))
    with pytest.raises(UserError, match="shorten or drop the prompt"):
        engine.generate(prompts_of([256]), 1, Sampling(max_tokens=100), (0,))
    ((c,), (d,)) = engine.generate(prompts, 1, Sampling(max_tokens=56), (0,))  # exactly full
    assert len(c.tokens) == len(d.tokens) == 56


def test_the_model_is_left_as_it_was_even_when_interrupted():
    model = copy.deepcopy(family("llama")).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]

    def interrupt(tokens, live):
        assert not model.training
        if tokens > 20:
            raise KeyboardInterrupt

    engine = engine_for(model, on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(RAGGED, 2, Sampling(max_tokens=20), (0,))
    assert [m.training for m in model.modules()] == before
    engine.on_progress = None
    engine.generate(RAGGED, 2, Sampling(max_tokens=3), (0,))
    assert [m.training for m in model.modules()] == before
    score(model, head_of(model), Batch([[1, 2]], [[3]], [0])).logp_T.sum().backward()  # sampling leaves nothing behind


def test_version_stats_and_progress():
    seen = []
    engine = engine_for(
        family("qwen3"), [END], max_rows=8, on_progress=lambda tokens, live: seen.append((tokens, live))
    )
    assert engine.exact and engine.version == 0
    engine.update([], 12)
    out = engine.generate(RAGGED, 3, Sampling(max_tokens=30), (0,))
    assert {c.version for group in out for c in group} == {12}
    total = sum(len(c.tokens) for group in out for c in group)
    assert engine.stats.completion_tokens == total == seen[-1][0]
    assert engine.stats.prompt_tokens == sum(len(p.tokens) for p in RAGGED)  # each once, not three times
    assert max(live for _, live in seen) <= 8 and seen[-1][1] == 0
    assert engine.stats.decode_steps >= total / 8 - len(RAGGED)
    assert 0.5 < engine.stats.occupancy <= 1
    assert engine.stats.prefill_seconds > 0 and engine.stats.decode_seconds > 0


def test_nothing_asked_nothing_given():
    assert engine_for(family("llama")).generate([], 4, Sampling(), (0,)) == []
    out = engine_for(family("llama")).generate(RAGGED, 2, Sampling(max_tokens=1), (0,))
    assert {len(c.tokens) for group in out for c in group} == {1}
