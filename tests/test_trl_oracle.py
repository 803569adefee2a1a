"""The objective against TRL's GRPOTrainer: the same batch gives the same advantages, loss and gradient.

TRL's own methods are called, unchanged: `_generate_and_score_completions` prepares the batch (padding, advantages,
masks; its generation and rewards handed in) and `compute_loss` scores it with its fused head. Our side is
the package's packed log-prob path over the same model.

Where the two differ by choice, the settings that make them equal are used here:
- TRL's `epsilon_high` for cispo is the bound itself, 1 + clip_high here; its lower bound is absent: clip_low = 1 here.
- TRL multiplies its k3 by the differentiated ratio unless `use_bias_correction_kl=False`; both are tested.
- TRL's grpo divides by all sequences, masked ones included; `sequence` weights divide by those that count.
- TRL's entropy bonus is a mean over tokens whatever the loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from truecourse.data.sequences import Batch
from truecourse.model import attention
from truecourse.model.logprobs import head_of, score
from truecourse.objective.advantages import group_advantages
from truecourse.objective.kl import kl_values
from truecourse.objective.surrogate import importance_ratio, spread, surrogate, token_weights

pytest.importorskip("trl")

P, G, MAX_TOKENS, EOS, PAD = 3, 4, 12, 30, 31
NAN = float("nan")
# in one group a score failed, one agrees, one is graded
REWARDS = [[1.0, 0.0, NAN, 0.0], [0.1, 0.1, 0.1, 0.1], [0.2, 0.8, 0.5, 0.3]]
close = torch.testing.assert_close


def tiny_model(seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
        initializer_range=0.4,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@dataclass
class Case:
    trainer: Any
    batch: Batch
    truncated_N: list[bool]
    old_T: Tensor
    ref_T: Tensor

    def logprobs(self) -> tuple[Tensor, Tensor]:
        return logprobs(self.trainer.model, self.batch)


def logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) of each completion token, both `[T]`, by the package's packed path; TRL keeps its own."""
    own = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        return score(model, head_of(model), batch)
    finally:
        model.set_attn_implementation(own)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {**{f"t{i}": i for i in range(EOS)}, "<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = GRPOTrainer(
        model=tiny_model(0),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=P * G, num_generations=G, max_completion_length=MAX_TOKENS, report_to=[],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["t1 t2"] * P}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(EOS, (n,), generator=g).tolist() for n in (3, 5, 2)]
    truncated = [i in (1, 6, 11) for i in range(P * G)]
    completions = []
    for i, cut in enumerate(truncated):
        length = MAX_TOKENS if cut else 1 + (5 * i) % MAX_TOKENS
        tokens = torch.randint(EOS, (length,), generator=g).tolist()
        completions.append(tokens if cut else [*tokens[:-1], EOS])
    batch = Batch(prompts, completions, [p for p in range(P) for _ in range(G)])
    with torch.no_grad():
        now_T = logprobs(trainer.model, batch)[0]
        old_T = now_T + 0.3 * torch.randn(now_T.shape, generator=g)  # some updates ago: about half beyond the clip
        ref_T = now_T + 0.5 * torch.randn(now_T.shape, generator=g)

    rewards_N1 = torch.tensor(REWARDS).reshape(-1, 1)
    generated = [prompts[p] for p in batch.owner], completions, None, [""] * (P * G), None, {}, None, None
    trainer._generate = lambda _: generated
    trainer._calculate_rewards = lambda *_: rewards_N1.clone()
    return Case(trainer, batch, truncated, old_T, ref_T)


@pytest.fixture(autouse=True)
def as_it_was(case: Case) -> Iterator[None]:
    """TRL reads these at loss time, so one trainer serves every test."""
    names = (
        "loss_type", "importance_sampling_level", "beta", "epsilon_low", "epsilon_high", "scale_rewards",
        "mask_truncated_completions", "entropy_coef", "_entropy_bonus_enabled",
    )  # fmt: skip
    before = {name: getattr(case.trainer, name) for name in names}
    yield
    for name, value in before.items():
        setattr(case.trainer, name, value)
    case.trainer.args.use_bias_correction_kl = True


def padded(values_T: Tensor, batch: Batch) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values_T.split(batch.lengths_N), batch_first=True)


def trl_inputs(case: Case) -> dict[str, Tensor]:
    trainer, beta = case.trainer, case.trainer.beta
    trainer.beta = 0.0  # its reference log-probs are handed in
    inputs = trainer._generate_and_score_completions([{"prompt": "t1"}] * (P * G))
    trainer.beta = beta
    inputs["old_per_token_logps"] = padded(case.old_T, case.batch)
    inputs["ref_per_token_logps"] = padded(case.ref_T, case.batch)
    return inputs


def gradient(loss: Tensor, model: Any) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def ours(
    case: Case, *, how: str, loss: str = "clip", level: str = "token", clip_low: float, clip_high: float, beta: float,
    corrected: bool = False, scale: str = "sample", mask: bool = False, entropy_bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, share of tokens clipped)."""
    lengths_N = case.batch.lengths_N
    adv_T = spread(group_advantages(torch.tensor(REWARDS), baseline="mean", scale=scale).flatten(), lengths_N)
    valid_N = ~torch.tensor(case.truncated_N) if mask else None
    logp_T, entropy_T = case.logprobs()
    loss_T, clipped_T = surrogate(
        logp_T, case.old_T, adv_T, lengths_N, loss=loss, level=level, clip_low=clip_low, clip_high=clip_high
    )
    if beta:
        kl_T = kl_values(logp_T, case.ref_T, "k3")
        if corrected:
            kl_T = kl_T * importance_ratio(logp_T, case.old_T, lengths_N, level)
        loss_T = loss_T + beta * kl_T
    total = (loss_T * token_weights(lengths_N, how, MAX_TOKENS, valid_N)).sum()
    if entropy_bonus:
        total = total - entropy_bonus * (entropy_T * token_weights(lengths_N, "token")).sum()
    return total, (clipped_T * token_weights(lengths_N, "token")).sum()


def compare(case: Case, total: Tensor) -> None:
    """Loss within 1e-5 relative and gradient within 1e-5 of its norm."""
    theirs = case.trainer.compute_loss(case.trainer.model, trl_inputs(case))
    close(total, theirs, atol=1e-6, rtol=1e-5)
    want = gradient(theirs, case.trainer.model)
    got = gradient(total, case.trainer.model)
    assert want.norm() > 1e-3
    assert (got - want).norm() <= 1e-5 * want.norm()


AGGREGATE = {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token", "bnpo": "token"}


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("beta,corrected", [(0.0, False), (0.2, False), (0.2, True)], ids=["beta0", "k3", "k3ratio"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", AGGREGATE)
def test_clipped_losses(case: Case, loss_type: str, level: str, beta: float, corrected: bool, mask: bool):
    trainer = case.trainer
    low, high = (0.2, 0.28) if level == "token" else (0.03, 0.05)
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    trainer.epsilon_low, trainer.epsilon_high, trainer.mask_truncated_completions = low, high, mask
    trainer.args.use_bias_correction_kl = corrected
    how = AGGREGATE[loss_type]
    total, clipped = ours(
        case, how=how, level=level, clip_low=low, clip_high=high, beta=beta, corrected=corrected, mask=mask
    )
    if mask and how == "sequence":
        total = total * (case.truncated_N.count(False) / len(case.truncated_N))
    compare(case, total)
    assert 0.1 < clipped < 0.6, "the clip is at work"
    if level == "token" and not mask:
        assert trainer._metrics["train"]["clip_ratio/region_mean"][-1] == pytest.approx(clipped.item(), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo(case: Case, level: str, beta: float):
    trainer = case.trainer
    high = 0.2 if level == "token" else 0.02
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = "cispo", level, beta
    trainer.epsilon_high = 1 + high
    trainer.args.use_bias_correction_kl = False
    total, clipped = ours(case, how="token", loss="cispo", level=level, clip_low=1.0, clip_high=high, beta=beta)
    assert clipped > 0.1
    compare(case, total)


@pytest.mark.parametrize("theirs,scale", [("group", "sample"), ("batch", "batch"), ("none", "none")])
def test_advantages(case: Case, theirs: str, scale: str):
    trainer = case.trainer
    trainer.scale_rewards = theirs
    want = trl_inputs(case)["advantages"].view(P, G)
    got = group_advantages(torch.tensor(REWARDS), baseline="mean", scale=scale)
    # TRL's float32 mean leaves a rest on the group that agrees, which its division enlarges; ours is exactly zero
    close(got, want, atol=2e-4, rtol=1e-5)
    alive = torch.tensor([True, False, True])
    close(got[alive], want[alive], atol=1e-6, rtol=1e-5)
    assert (got[1] == 0).all()
    population = group_advantages(torch.tensor(REWARDS), baseline="mean", scale="population")
    assert (population - want).abs().max() > 0.05
    trainer.loss_type, trainer.beta = "dapo", 0.0
    compare(case, ours(case, how="token", clip_low=0.2, clip_high=0.2, beta=0.0, scale=scale)[0])


@pytest.mark.parametrize("loss_type", AGGREGATE)
def test_entropy_bonus(case: Case, loss_type: str):
    trainer = case.trainer
    trainer.loss_type, trainer.entropy_coef, trainer._entropy_bonus_enabled = loss_type, 0.3, True
    compare(case, ours(case, how=AGGREGATE[loss_type], clip_low=0.2, clip_high=0.2, beta=0.0, entropy_bonus=0.3)[0])


@pytest.mark.parametrize(
    "fault",
    [
        {"scale": "population"},
        {"how": "token"},
        {"clip_low": 0.28, "clip_high": 0.2},
        {"level": "sequence"},
        {"loss": "cispo"},
        {"loss": "reinforce"},
        {"beta": 0.1},
        {"corrected": True},
        {"mask": True},
    ],
    ids=str,
)
def test_planted_faults_are_caught(case: Case, fault: dict[str, Any]):
    trainer = case.trainer
    trainer.loss_type, trainer.beta, trainer.epsilon_low, trainer.epsilon_high = "grpo", 0.2, 0.2, 0.28
    trainer.args.use_bias_correction_kl = False
    right: dict[str, Any] = {"how": "sequence", "clip_low": 0.2, "clip_high": 0.28, "beta": 0.2}
    compare(case, ours(case, **right)[0])
    with pytest.raises(AssertionError):
        compare(case, ours(case, **(right | fault))[0])
