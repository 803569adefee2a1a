"""The model room: one log-prob path, exact against each model's own forward, however a batch is cut."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import NAMES, VOCABULARY, loaded, naive_logprobs, ragged, tiny

from truecourse.data.sequences import Batch
from truecourse.errors import UserError
from truecourse.model import attention, loading, logprobs
from truecourse.model.loading import Loaded, load
from truecourse.model.logprobs import head_of, score, seam_holds
from truecourse.model.optimizer import Adam
from truecourse.model.policy import Policy
from truecourse.recipe import Lora

CPU = torch.device("cpu")


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def worst(a, b):
    assert [x is None for x in a] == [y is None for y in b]
    return max(float((x - y).abs().max() / (y.abs().max() + 1e-6)) for x, y in zip(a, b) if x is not None)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_entropies_and_gradients_are_the_models_own(name, packed, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", VOCABULARY * 7)  # several chunks
    model, batch, temperature = tiny(name), ragged(), 0.7
    torch.manual_seed(1)
    u, w = torch.randn(2, sum(batch.lengths_N))
    model.set_attn_implementation("eager")
    logp, entropy = naive_logprobs(model, batch, temperature)
    theirs = gradients(model, (u * logp + w * entropy).sum())
    loaded(model, packed)
    ours = score(model, head_of(model), batch, temperature, packed=packed)
    torch.testing.assert_close(ours.logp_T, logp, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.entropy_T, entropy, atol=2e-5, rtol=0)
    assert worst(gradients(model, (u * ours.logp_T + w * ours.entropy_T).sum()), theirs) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_with_adapters_and_with_checkpointing(name, tmp_path):
    model = tiny(name)
    lora = Lora(rank=4, targets=("c_attn", "c_proj") if name == "gpt2" else "all-linear")
    model = loading._with_adapters(model, lora)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.1)
    batch = ragged()
    model.set_attn_implementation("eager")
    logp, _ = naive_logprobs(model, batch)
    theirs = gradients(model, logp.sum())
    for checkpointing in (False, True):
        policy = Policy(loaded(model), gradient_checkpointing=checkpointing)
        ours = policy.logprobs(batch).logp_T
        torch.testing.assert_close(ours, logp, atol=2e-5, rtol=0)
        assert worst(gradients(model, ours.sum()), theirs) < 1e-4


def test_a_layout_that_ignored_the_window_would_be_caught(monkeypatch):
    model = loaded(tiny("mistral")).model
    assert seam_holds(model, head_of(model)) < 1e-4
    blind = attention.Packed.attend
    monkeypatch.setattr(
        attention.Packed,
        "attend",
        lambda self, layer, q, k, v, rules: blind(self, layer, q, k, v, attention.Rules(rules.scaling, None, None)),
    )
    assert seam_holds(model, head_of(model)) > 1e-3


def test_an_attention_layer_that_asks_for_more_is_refused_by_name():
    model = loaded(tiny("llama")).model
    with pytest.raises(NotImplementedError, match="s_aux"), attention.using(attention.Packed(ragged())):
        attention._attention(model.model.layers[0].self_attn, None, None, None, object(), s_aux=torch.ones(4))


def test_a_shared_prompt_is_a_repeated_prompt():
    policy, batch = Policy(loaded(tiny("qwen3"))), ragged()
    apart = Batch([batch.prompts[o] for o in batch.owner], batch.completions, range(len(batch.owner)))
    a, b = policy.logprobs(batch).logp_T, policy.logprobs(apart).logp_T
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert worst(gradients(policy.model, a.sum()), gradients(policy.model, b.sum())) < 1e-4


@pytest.mark.parametrize("budget", [1, 16, 40, 60])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(budget):
    policy, batch = Policy(loaded(tiny("llama"))), ragged()
    weight_T = torch.randn(sum(batch.lengths_N), generator=torch.Generator().manual_seed(0))

    def accumulate(micro_tokens):
        policy.micro_tokens = micro_tokens
        parts = policy.micro_batches(batch)
        for part in parts:
            policy.backward((policy.logprobs(part.batch).logp_T * weight_T[part.tokens]).sum())
        grads = [p.grad.clone() for p in policy.model.parameters()]
        policy.optimizer.adam.zero_grad()
        return len(parts), grads

    one, whole = accumulate(10_000)
    many, cut = accumulate(budget)
    assert one == 1 and many > 1
    assert worst(cut, whole) < 1e-4


def test_micro_batches_keep_the_budget_and_the_order():
    policy, batch = Policy(loaded(tiny("llama"))), ragged()
    for budget in (1, 10, 30, 50, 1000):
        policy.micro_tokens = budget
        parts = policy.micro_batches(batch)
        assert [list(c) for p in parts for c in p.batch.completions] == [list(c) for c in batch.completions]
        assert [p.batch.prompts[o] for p in parts for o in p.batch.owner] == [batch.prompts[o] for o in batch.owner]
        assert [t for p in parts for t in range(p.tokens.start, p.tokens.stop)] == list(range(sum(batch.lengths_N)))
        for part in parts:
            size = sum(map(len, part.batch.prompts)) + sum(part.batch.lengths_N)
            assert size <= budget or len(part.batch.completions) == 1


def test_a_group_that_fits_is_not_cut():
    policy = Policy(loaded(tiny("llama")))
    batch = Batch([[1] * 6] * 4, [[2] * 3] * 8, [0, 0, 1, 1, 2, 2, 3, 3])  # four groups of 12 tokens
    sizes = {12: [2, 2, 2, 2], 20: [2, 2, 2, 2], 24: [4, 4], 35: [4, 4], 11: [1] * 8, 48: [8]}
    for budget, completions in sizes.items():
        policy.micro_tokens = budget
        assert [len(part.batch.completions) for part in policy.micro_batches(batch)] == completions


# -- reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["copy", "offload"])
def test_a_copied_reference_stays_while_the_policy_moves(kind):
    policy, batch = Policy(loaded(tiny("llama")), reference=kind), ragged()
    before = policy.score(batch)
    torch.testing.assert_close(policy.reference(batch), before, atol=0, rtol=0)
    policy.backward(policy.logprobs(batch).logp_T.sum())
    policy.step(1e-2)
    assert float((policy.score(batch) - before).abs().max()) > 1e-2
    torch.testing.assert_close(policy.reference(batch), before, atol=0, rtol=0)
    policy.move_reference(1.0)
    torch.testing.assert_close(policy.reference(batch), policy.score(batch), atol=0, rtol=0)


def test_the_adapter_switched_off_is_the_base():
    base, batch = tiny("llama"), ragged()
    before = Policy(loaded(base)).score(batch)
    policy = Policy(loaded(loading._with_adapters(base, Lora(rank=4))), reference="adapter_off")
    policy.backward(policy.logprobs(batch).logp_T.sum())
    policy.step(1e-2)
    assert float((policy.score(batch) - before).abs().max()) > 1e-3
    torch.testing.assert_close(policy.reference(batch), before, atol=1e-6, rtol=0)


# -- optimiser --------------------------------------------------------------------------------------------------------


def test_the_optimiser_is_torchs_adamw_with_clipping():
    ours, theirs = tiny("llama"), tiny("llama")
    adam = Adam(ours, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(3):
        for model in (ours, theirs):
            naive_logprobs(model, ragged(step))[0].sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert adam.step(1e-3, 0.5) == pytest.approx(float(norm), rel=1e-5)
        other.step()
        other.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_half_precision_is_trained_through_a_float32_master():
    model = tiny("llama").bfloat16()
    adam, p = Adam(model), next(model.parameters())
    before = p.detach().clone()
    for _ in range(50):  # each step is far below bfloat16's resolution; together they are above it
        for q in model.parameters():
            q.grad = torch.ones_like(q)
        adam.step(2e-4)
    moved = (before.float() - adam.master[next(iter(adam.live))]).detach().mean()
    assert float(moved) == pytest.approx(50 * 2e-4, rel=0.02)
    torch.testing.assert_close(p, adam.master[next(iter(adam.live))].bfloat16(), atol=0, rtol=0)


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    model = tiny("llama")
    adam, before = Adam(model), [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), float("nan"))
    assert adam.step(1e-2, 1.0) != adam.step(1e-2, 1.0)  # NaN, then 0 gradients
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("half", [False, True])
def test_policy_state_round_trips_to_the_bit(half):
    def make():
        model = tiny("llama")
        return Policy(loaded(model.bfloat16() if half else model), reference="copy")

    batch, a, b = ragged(), make(), make()
    for _ in range(2):
        a.backward(a.logprobs(batch).logp_T.mean())
        a.step(1e-2)
    a.move_reference(0.5)
    b.load_state({k: v.clone() for k, v in a.state(moving_reference=True).items()}, a.version)
    for policy in (a, b):
        policy.backward(policy.logprobs(batch).logp_T.mean())
        policy.step(1e-2)
    assert a.version == b.version == 3
    assert torch.equal(a.score(batch), b.score(batch)) and torch.equal(a.reference(batch), b.reference(batch))


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A plain Hugging Face folder of a tiny model with the shipped tokenizer."""
    from truecourse.lab.tiny import save_new

    path = tmp_path_factory.mktemp("model")
    save_new(path, seed=0)
    return path


def test_a_folder_loads_onto_the_packed_path(folder):
    found = load(str(folder), device=CPU)
    assert found.packed and not found.note and found.model.dtype == torch.float32


def test_saved_weights_are_a_plain_folder(folder, tmp_path):
    import transformers

    policy = Policy(load(str(folder), device=CPU))
    policy.save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(policy.model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    assert not list((tmp_path / "out").glob("*.bin"))


def test_saved_adapters_load_merged(folder, tmp_path):
    batch = ragged()
    policy = Policy(load(str(folder), device=CPU, lora=Lora(rank=4)), reference="adapter_off")
    policy.backward(policy.logprobs(batch).logp_T.sum())
    policy.step(1e-2)
    policy.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    again = Policy(load(str(tmp_path / "adapter"), device=CPU))
    torch.testing.assert_close(again.score(batch), policy.score(batch), atol=1e-5, rtol=0)


def test_a_frozen_copy_of_an_adapted_model_keeps_its_adapters(folder):
    batch = ragged()
    policy = Policy(load(str(folder), device=CPU, lora=Lora(rank=4)), reference="copy")
    torch.testing.assert_close(policy.reference(batch), policy.score(batch), atol=0, rtol=0)
    assert hasattr(policy.model, "peft")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, tmp: str(tmp / "nowhere"), "does not exist"),
        (lambda folder, tmp: str(_touch(tmp / "a.bin")), "is a file"),
        (lambda folder, tmp: str(tmp), "no config.json"),
        (lambda folder, tmp: str(_pickled(folder, tmp)), "only pickled weights"),
        (lambda folder, tmp: str(tmp / "a.gguf"), "does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_named(make, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        load(make(folder, tmp_path), device=CPU)


def test_four_bit_and_cuda_are_refused_where_there_is_no_gpu(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        load(str(folder), device=CPU, lora=Lora(quantize="4bit"))
    with pytest.raises(UserError, match="no CUDA GPU"):
        loading.resolve_device("cuda")


def test_adapter_targets_that_do_not_exist_are_named(folder):
    with pytest.raises(UserError, match="nowhere_proj"):
        load(str(folder), device=CPU, lora=Lora(targets=("nowhere_proj",)))


def test_a_model_outside_the_registry_runs_padded_and_says_so():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    packed, note = loading._prepare_seam(model, torch.float32)
    assert not packed and "padded path" in note
    batch = ragged()
    torch.testing.assert_close(
        Policy(Loaded(model, None, (), packed)).score(batch),
        naive_logprobs(model, batch)[0].detach(),
        atol=1e-5,
        rtol=0,
    )


def _touch(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


def _pickled(folder: Path, tmp: Path) -> Path:
    shutil.copy(folder / "config.json", tmp / "config.json")
    torch.save({}, tmp / "pytorch_model.bin")
    return tmp
