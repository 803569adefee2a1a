"""Preference losses: against TRL's own code, against closed forms, and what must not matter."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from truecourse.objective.preference import bradley_terry, implicit_rewards, pair_loss
from truecourse.objective.surrogate import segment_sum

close = torch.testing.assert_close
MARGINS = torch.tensor([-30.0, -2.0, -0.1, 0.0, 0.4, 3.0, 40.0], dtype=torch.float64)


# -- Bradley–Terry ----------------------------------------------------------------------------------------------------


def test_bradley_terry_is_the_likelihood_of_the_choice():
    for m in MARGINS.tolist():
        assert bradley_terry(torch.tensor(m, dtype=torch.float64)).item() == pytest.approx(
            math.log1p(math.exp(-m)), rel=1e-12
        )


def test_probabilities_of_both_choices_sum_to_one():
    close((-bradley_terry(MARGINS)).exp() + (-bradley_terry(-MARGINS)).exp(), torch.ones_like(MARGINS))


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_smoothing_is_the_mean_over_flipped_labels(noise: float):
    want = (1 - noise) * bradley_terry(MARGINS) + noise * bradley_terry(-MARGINS)
    close(bradley_terry(MARGINS, noise), want)
    m = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    least = m[bradley_terry(m, noise).argmin()].item()
    assert least == pytest.approx(math.log((1 - noise) / noise), abs=1e-3)


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_robust_loss_is_unbiased_under_flips(noise: float):
    """Its mean over labels flipped with probability ε is the loss on clean labels; the smoothed one's is not."""
    flipped = lambda **how: (1 - noise) * bradley_terry(MARGINS, **how) + noise * bradley_terry(-MARGINS, **how)  # noqa: E731
    close(flipped(label_smoothing=noise, robust=True), bradley_terry(MARGINS))
    assert (flipped(label_smoothing=noise) - bradley_terry(MARGINS)).abs().max() > 0.1


# -- the family -------------------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "length": "sum"},
    "smoothed": {"loss": "sigmoid", "length": "sum", "label_smoothing": 0.2},
    "robust": {"loss": "sigmoid", "length": "sum", "label_smoothing": 0.2, "robust": True},
    "ipo": {"loss": "square", "length": "mean"},
    "hinge": {"loss": "hinge", "length": "sum"},
    "sigmoid_norm": {"loss": "sigmoid", "length": "mean"},
    "simpo": {"loss": "sigmoid", "length": "mean", "target_margin": 0.7},
}


def family(form: str, logp: Tensor, ref: Tensor | None, lengths: Any, beta: float) -> tuple[Tensor, Tensor]:
    """(losses of the pairs, rewards of the answers)"""
    how = dict(FORMS[form])
    rewards = implicit_rewards(logp, ref, lengths, beta, how.pop("length"))
    return pair_loss(rewards[::2] - rewards[1::2], beta=beta, **how), rewards


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_on_both_rewards_changes_nothing(form: str):
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 8, generator=g, dtype=torch.float64)
    lengths = torch.tensor([3, 3, 5, 5, 2, 2, 7, 7])  # of equal length in a pair: else a mean is not that constant
    shift = torch.tensor([1.5, -4.0, 20.0, 0.3]).double().repeat_interleave(2)
    close(family(form, logp + shift, ref, lengths, 0.3)[0], family(form, logp, ref, lengths, 0.3)[0])


def test_ipo_and_hinge_by_hand():
    margin = torch.tensor([0.05, 0.5, 2.0])  # β times score differences 0.5, 5, 20
    close(pair_loss(margin, loss="square", beta=0.1), (torch.tensor([0.5, 5.0, 20.0]) - 5.0) ** 2)
    close(pair_loss(margin, loss="hinge", beta=0.1), torch.tensor([0.95, 0.5, 0.0]))


def test_dpos_gradient_is_bradley_terrys_under_the_implicit_reward():
    """∇ log π of chosen and rejected weigh −β·σ(−m) and β·σ(−m) (DPO, §4): Bradley–Terry's gradient, times dr/dlogπ."""
    g = torch.Generator().manual_seed(1)
    logp, ref = torch.randn(2, 8, generator=g, dtype=torch.float64)
    logp.requires_grad_()
    beta, lengths = 0.3, [4] * 8
    family("sigmoid", logp, ref, lengths, beta)[0].sum().backward()
    rewards = (beta * (logp - ref)).detach().requires_grad_()
    bradley_terry(rewards[::2] - rewards[1::2]).sum().backward()
    close(logp.grad, beta * rewards.grad)
    weight = beta * torch.sigmoid(rewards[1::2] - rewards[::2]).detach()
    close(logp.grad, torch.stack([-weight, weight], 1).reshape(-1))


def test_contradictions_are_refused():
    for wrong in ({"loss": "hinge", "label_smoothing": 0.1}, {"loss": "square", "target_margin": 1.0}):
        with pytest.raises(AssertionError):
            pair_loss(MARGINS, beta=0.1, **wrong)
    with pytest.raises(AssertionError):
        bradley_terry(MARGINS, 0.5)


# -- TRL's DPOTrainer -------------------------------------------------------------------------------------------------

PAIRS, EOS, PAD = 5, 30, 31
TYPES = {"sigmoid": "sigmoid", "robust": "robust", "ipo": "ipo", "hinge": "hinge", "sigmoid_norm": "sigmoid_norm"}


@pytest.fixture(scope="module")
def trl_case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own trainer over a tiny model, five pairs that share their prompts, and a reference's log-probs."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from truecourse.data.sequences import Batch

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
        initializer_range=0.4,
    )  # fmt: skip
    words = {**{f"t{i}": i for i in range(EOS)}, "<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = Qwen3ForCausalLM(config)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS, report_to=[], disable_dropout=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["t1 t2"], "chosen": ["t3"], "rejected": ["t4"]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"),
    )  # fmt: skip
    trainer.model.train()
    trainer.precompute_ref_logps = True  # the reference's log-probs are handed in

    g = torch.Generator().manual_seed(1)
    tokens = lambda n: torch.randint(EOS, (n,), generator=g).tolist()  # noqa: E731
    prompts = [tokens(n) for n in (3, 5, 1, 4, 2)]
    answers = [[*tokens(n), EOS] for n in (4, 1, 2, 7, 6, 3, 1, 1, 9, 5)]
    batch = Batch(prompts, answers, [i // 2 for i in range(2 * PAIRS)])
    logp = logps(trainer.model, batch).detach()
    ref = logp + 4 * torch.randn(2 * PAIRS, generator=g)
    examples = [
        {
            "prompt_ids": prompts[i], "chosen_ids": answers[2 * i], "rejected_ids": answers[2 * i + 1],
            "ref_chosen_logps": ref[2 * i].item(), "ref_rejected_logps": ref[2 * i + 1].item(),
        }
        for i in range(PAIRS)
    ]  # fmt: skip
    inputs = DataCollatorForPreference(pad_token_id=PAD)(examples)
    return SimpleNamespace(trainer=trainer, model=trainer.model, batch=batch, ref=ref, inputs=inputs)


def logps(model: Any, batch: Any) -> Tensor:
    """Log-prob of each answer by the package's packed path, prompts shared; TRL keeps its own attention."""
    from truecourse.model import attention
    from truecourse.model.logprobs import head_of, score

    own = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        return segment_sum(score(model, head_of(model), batch)[0], batch.lengths_N)
    finally:
        model.set_attn_implementation(own)


def gradient(loss: Tensor, model: Any) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(model: Any, got: Tensor, want: Tensor) -> None:
    """Loss within 1e-5 relative, gradient within 1e-5 of its norm."""
    close(got, want, atol=1e-6, rtol=1e-5)
    theirs, ours = gradient(want, model), gradient(got, model)
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def trl_loss(case: Any, loss_type: str, beta: float, smoothing: float) -> Tensor:
    trainer = case.trainer
    trainer.loss_types, trainer.loss_weights, trainer.beta = [loss_type], [1.0], beta
    trainer.label_smoothing = smoothing
    return trainer.compute_loss(case.model, dict(case.inputs))


@pytest.mark.parametrize("beta", [0.1, 0.6])
@pytest.mark.parametrize("form", TYPES)
def test_loss_and_gradient_equal_trls(trl_case: Any, form: str, beta: float):
    smoothing = FORMS[form].get("label_smoothing", 0.0)
    want = trl_loss(trl_case, TYPES[form], beta, smoothing)
    losses, rewards = family(form, logps(trl_case.model, trl_case.batch), trl_case.ref, trl_case.batch.lengths_N, beta)
    compare(trl_case.model, losses.mean(), want)
    if FORMS[form]["length"] == "sum":
        logged = trl_case.trainer._metrics["train"]
        assert logged["rewards/chosen"][-1] == pytest.approx(rewards[::2].mean().item(), rel=1e-4, abs=1e-5)
        assert logged["rewards/rejected"][-1] == pytest.approx(rewards[1::2].mean().item(), rel=1e-4, abs=1e-5)
        margins = rewards[::2] - rewards[1::2]
        assert logged["rewards/accuracies"][-1] == pytest.approx((margins > 0).float().mean().item())


def test_smoothed_loss_and_gradient_equal_trls(trl_case: Any):
    """TRL smooths labels in `aot_unpaired`, which is the smoothed sigmoid where there is one pair (nothing to sort)."""
    from truecourse.data.sequences import Batch

    beta, smoothing = 0.3, FORMS["smoothed"]["label_smoothing"]
    for i in range(PAIRS):
        rows = [i, PAIRS + i]  # TRL's rows: all chosen, then all rejected
        one = {k: v[rows] if v.shape[0] == 2 * PAIRS else v[[i]] for k, v in trl_case.inputs.items()}
        case = SimpleNamespace(trainer=trl_case.trainer, model=trl_case.model, inputs=one)
        want = trl_loss(case, "aot_unpaired", beta, smoothing)
        batch = Batch([trl_case.batch.prompts[i]], trl_case.batch.completions[2 * i : 2 * i + 2], [0, 0])
        ref = trl_case.ref[2 * i : 2 * i + 2]
        got = family("smoothed", logps(trl_case.model, batch), ref, batch.lengths_N, beta)[0].mean()
        compare(trl_case.model, got, want)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trls(trl_case: Any, smoothing: float):
    """TRL has SimPO in its CPO trainer: the loss, and the mean log-probs that it is given."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    beta, gamma, model, inputs = 2.0, 0.7, trl_case.model, trl_case.inputs
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    mean = cpo.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    itself = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    want = cpo.CPOTrainer.cpo_loss(itself, *mean.chunk(2))[0].mean()
    rewards = implicit_rewards(logps(model, trl_case.batch), None, trl_case.batch.lengths_N, beta, "mean")
    how: dict[str, Any] = {"loss": "sigmoid", "beta": beta, "label_smoothing": smoothing, "target_margin": gamma}
    compare(model, pair_loss(rewards[::2] - rewards[1::2], **how).mean(), want)


@pytest.mark.parametrize(
    "fault",
    [{"form": "hinge"}, {"form": "sigmoid_norm"}, {"form": "smoothed"}, {"beta": 0.2}, {"ref": None}, {"swap": True}],
    ids=str,
)
def test_planted_faults_are_caught(trl_case: Any, fault: dict[str, Any]):
    def ours(form: str = "sigmoid", beta: float = 0.1, ref: Any = trl_case.ref, swap: bool = False) -> Tensor:
        logp = logps(trl_case.model, trl_case.batch)
        if swap:
            logp, ref = (x.view(-1, 2).flip(1).reshape(-1) for x in (logp, ref))
        return family(form, logp, ref, trl_case.batch.lengths_N, beta)[0].mean()

    compare(trl_case.model, ours(), trl_loss(trl_case, "sigmoid", 0.1, 0.0))
    with pytest.raises(AssertionError):
        compare(trl_case.model, ours(**fault), trl_loss(trl_case, "sigmoid", 0.1, 0.0))
