"""GRPO and its variants against an independent hand: naive log-probs, the papers' formulas in loops, torch's AdamW."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import NAMES, VOCABULARY, loaded, naive_logprobs, tiny
from torch import Tensor

from truecourse.data.sequences import Batch, Completion, Prompt
from truecourse.errors import UserError
from truecourse.methods.grpo import GRPO, VARIANTS, resolve
from truecourse.methods.rollouts import Group, batch_of
from truecourse.model.policy import Policy
from truecourse.recipe import Grpo, RewardPart, Sampling
from truecourse.rewards import Failure, Scores
from truecourse.rollout.local import LocalEngine
from truecourse.run.loop import StepResult

MAX_TOKENS = 10
HEAT = 0.8
END = 1
RewardFunction = Callable[[Prompt, int, Completion], float | None]


def even(prompt: Prompt, g: int, completion: Completion) -> float:
    """The share of even tokens: random policies earn about a half, and differ."""
    return sum(t % 2 == 0 for t in completion.tokens) / len(completion.tokens)


class Reward:
    """Scores by a function of a prompt, a sample's place, and its completion. NaN is a failure."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def score(self, prompts: list[Prompt], completions: list[list[Completion]]) -> Scores:
        parts = [[self.function(p, g, c) for g, c in enumerate(group)] for p, group in zip(prompts, completions)]
        values = [[math.nan if v is None else v for v in row] for row in parts]
        failures = [
            Failure("fake", p.index, g, "broken")
            for p, row in zip(prompts, parts)
            for g, v in enumerate(row)
            if v is not None and v != v
        ]
        return Scores(values_PG=values, parts={"fake": parts}, failures=failures)


def method(
    reward: RewardFunction = even, *, model: str = "llama", prompts: int = 8, shift: float = 0.0,
    micro_tokens: int = 8192, reference: Any = "copy", max_tokens: int = MAX_TOKENS, **settings: Any,
) -> GRPO:  # fmt: skip
    """A method over a tiny random model. `shift` moves the policy's weights away from the reference's."""
    net = tiny(model)
    policy = Policy(loaded(net), reference=reference, micro_tokens=micro_tokens)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(shift * torch.randn(p.shape, generator=draw))
    engine = LocalEngine(net, (END,), lambda ids: " ".join(map(str, ids)))
    settings = {"prompts_per_step": 4, "group_size": 4, "max_reward_failures": 0.9} | settings
    sampling = Sampling(max_tokens=max_tokens, temperature=HEAT)
    config = Grpo(data="x", rewards=(RewardPart(use="exact"),), sampling=sampling, **settings)
    lengths = torch.Generator().manual_seed(1)
    rows = [
        Prompt(i, f"prompt {i}", tuple(torch.randint(2, VOCABULARY, (2 + i % 5,), generator=lengths).tolist()))
        for i in range(prompts)
    ]
    return GRPO(resolve(config), policy, engine, Reward(reward), rows, 0)


def plain(model: Any) -> Any:
    """A copy on transformers' own attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def quiet(text: str) -> None:
    pass


def collect(m: GRPO, step: int = 1) -> tuple[list[list[Group]], StepResult]:
    """Its next rollout, not yet spent."""
    result = StepResult({})
    m._collect(step, quiet, result)
    return m.shares, result


def with_gradients(m: GRPO) -> dict[str, Tensor]:
    """The gradients of the steps that it takes from now on, by parameter; the last step's stand there."""
    found: dict[str, Tensor] = {}
    step = m.policy.step

    def spy(lr: float) -> float:
        found.update({name: p.grad.clone() for name, p in m.policy.optimizer.live.items()})  # type: ignore[union-attr]
        return step(lr)

    m.policy.step = spy  # type: ignore[method-assign]
    return found


# -- the formulas, by hand --------------------------------------------------------------------------------------------

CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "reinforce++": (0.2, 0.2),
}


def hand_advantages(variant: str, rewards: list[list[float]]) -> list[list[float]]:
    """A table of P × G rewards to advantages, each variant by its paper."""
    every = [r for row in rewards for r in row]
    mean = sum(every) / len(every)
    std = math.sqrt(sum((r - mean) ** 2 for r in every) / (len(every) - 1))
    if variant == "reinforce++":
        return [[(r - mean) / (std + 1e-4) for r in row] for row in rewards]
    out = []
    for row in rewards:
        n, own = len(row), sum(row) / len(row)
        spread = math.sqrt(sum((r - own) ** 2 for r in row) / (n - 1))
        if variant == "rloo":
            out.append([r - (sum(row) - r) / (n - 1) for r in row])
        elif variant == "dr_grpo":
            out.append([r - own for r in row])
        else:
            out.append([(r - own) / (spread + 1e-4) for r in row])
    return out


def hand_loss(
    variant: str, logps: list[Tensor], olds: list[Tensor], advantages: list[float], max_tokens: int = MAX_TOKENS
) -> Tensor:
    """The loss of sequences' token log-probs, one term at a time."""
    total, tokens, n = torch.zeros(()), sum(map(len, logps)), len(logps)
    for logp, old, a in zip(logps, olds, advantages):
        for t in range(len(logp)):
            ratio = (logp[t] - old[t]).exp() if variant != "gspo" else (logp - old).mean().exp()
            if variant == "rloo":
                term = -a * logp[t]
            elif variant == "cispo":
                term = -ratio.detach().clamp(0, 5) * a * logp[t]
            else:
                low, high = CLIPS[variant]
                term = -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            if variant in ("dr_grpo", "rloo"):
                total = total + term / (n * max_tokens)
            elif variant == "gspo":
                total = total + term / (n * len(logp))
            else:
                total = total + term / tokens
    return total


def hand_update(twin: Any, adam: Any, groups: list[Group], loss: Callable[[list[Tensor]], Tensor], lr: float) -> float:
    """One update of `twin` on these groups; returns the loss."""
    batch = batch_of(groups)[0]
    logp_T, _ = naive_logprobs(twin, batch, HEAT)
    value = loss(list(logp_T.split(batch.lengths_N)))
    adam.zero_grad()
    value.backward()
    adam.param_groups[0]["lr"] = lr
    adam.step()
    return float(value.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_become_the_variants_advantages(variant: str) -> None:
    m = method(variant=variant, shift=0.02, overlong_tokens=0)
    (groups,), _ = collect(m)
    rewards = [[even(g.prompt, i, c) for i, c in enumerate(g.completions)] for g in groups]
    if m.values.kl_in == "reward" and m.values.beta:
        model, frozen = plain(m.policy.model), plain(m.policy._reference)
        for row, group in zip(rewards, groups):
            for i, c in enumerate(group.completions):
                batch = Batch([group.prompt.tokens], [c.tokens], [0])
                with torch.no_grad():
                    gap = naive_logprobs(model, batch, HEAT)[0] - naive_logprobs(frozen, batch, HEAT)[0]
                assert abs(float(gap.sum())) > 1e-3
                row[i] -= {"rloo": 0.05, "reinforce++": 0.01}[variant] * float(gap.sum())
    expected = hand_advantages(variant, rewards)
    for group, row in zip(groups, expected):
        assert group.advantages == pytest.approx(row, abs=2e-4)
    assert len({round(a, 3) for g in groups for a in g.advantages}) > 4


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_is_the_papers_by_hand(variant: str, updates: int) -> None:
    """Loss, gradient and weights of each update on a rollout. The second is off policy: ratios leave 1."""
    lr = 3e-3
    m = method(variant=variant, updates_per_rollout=updates, overlong_tokens=0)
    twin = plain(m.policy.model)
    adam = torch.optim.AdamW(twin.parameters(), lr=lr, weight_decay=0.0)
    gradients = with_gradients(m)
    shares, _ = collect(m)
    shares = list(shares)
    assert len(shares) == updates
    for i, groups in enumerate(shares):
        _, advantages, stored, _ = batch_of(groups)
        lengths = batch_of(groups)[0].lengths_N

        def loss(
            logps: list[Tensor],
            fresh: bool = i == 0,
            a: Tensor = advantages,
            s: Tensor = stored,
            n: list[int] = lengths,
        ) -> Tensor:
            olds = [logp.detach() for logp in logps] if fresh else list(s.split(n))
            return hand_loss(variant, logps, olds, a.tolist())

        expected = hand_update(twin, adam, groups, loss, lr)
        record = m.step(i + 1, lr, quiet).record
        assert record["loss"] == pytest.approx(expected, abs=2e-5)
        for name, p in twin.named_parameters():
            assert (gradients[name] - p.grad).norm() <= 2e-4 * p.grad.norm() + 1e-7, name
            # Adam divides by |gradient|: where that is rounding noise, so is the update, and it is at most lr a step
            settled = p.grad.abs() > 1e-4 * p.grad.abs().max()
            gap = (m.policy.model.get_parameter(name) - p).detach().abs()
            assert gap[settled].max() < 0.05 * lr and gap.max() <= 2.01 * lr * (i + 1), name
    if updates == 2:
        assert record["kl/update"] > 1e-4
        assert variant in ("rloo", "cispo") or record["clip/fraction"] > 0


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_term_is_the_estimators_by_hand(kind: str, fresh: bool) -> None:
    m = method(beta=0.3, kl_loss=kind, shift=0.02, updates_per_rollout=2)
    gradients = with_gradients(m)
    shares, _ = collect(m)
    groups = list(shares)[0 if fresh else 1]
    if not fresh:
        m.step(1, 2e-3, quiet)
    batch, advantages, stored, _ = batch_of(groups)
    twin = plain(m.policy.model)
    logp, _ = naive_logprobs(twin, batch, HEAT)
    with torch.no_grad():
        ref, _ = naive_logprobs(plain(m.policy._reference), batch, HEAT)
    old = logp.detach() if fresh else stored
    d = logp - ref
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind]
    kl = kl * (logp.detach() - old).exp()
    surrogate = hand_loss(
        "grpo", list(logp.split(batch.lengths_N)), list(old.split(batch.lengths_N)), advantages.tolist()
    )
    (surrogate + 0.3 * kl.mean()).backward()
    record = m.step(2, 1e-3, quiet).record
    for name, p in twin.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 2e-4 * p.grad.norm() + 1e-7, name
    k3 = ((ref - logp).exp() - 1 + logp - ref).detach()
    assert record["kl/ref"] == pytest.approx(float(sum(part.sum() for part in k3.split(batch.lengths_N))) / 8, rel=1e-3)
    assert record["kl/ref_k1"] == pytest.approx(float((logp - ref).detach().sum()) / 8, rel=1e-3)


# -- what never changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["grpo", "gspo", "rloo"])
def test_gradients_do_not_depend_on_how_the_batch_is_cut(variant: str) -> None:
    found = []
    for budget in (8192, 20, 1):
        m = method(variant=variant, beta=0.1, shift=0.02, micro_tokens=budget)
        gradients = with_gradients(m)
        record = m.step(1, 1e-3, quiet).record
        found.append((gradients, record))
    for gradients, record in found[1:]:
        for name, expected in found[0][0].items():
            assert (gradients[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name
        for key in ("loss", "entropy", "kl/ref", "grad_norm", "clip/fraction"):
            assert record[key] == pytest.approx(found[0][1][key], rel=1e-4, abs=1e-6)


def test_on_policy_the_ratio_is_1_and_only_then() -> None:
    m = method(updates_per_rollout=2, epochs=2)
    records = [m.step(step, 5e-3, quiet).record for step in range(1, 6)]
    for fresh in (records[0], records[4]):
        assert fresh["clip/fraction"] == 0 and fresh["ess"] == pytest.approx(1, abs=1e-6)
        assert 0 <= fresh["kl/sampler"] < 1e-9 and "kl/update" not in fresh
        assert "reward/mean" in fresh and "length/mean" in fresh
    for stale in records[1:4]:
        assert stale["kl/update"] > 1e-4 and not {"kl/sampler", "ess", "reward/mean", "tokens/completion"} & set(stale)
    assert records[2]["kl/update"] > records[1]["kl/update"] / 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probs_are_the_trainers(name: str, temperature: float) -> None:
    m = method(model=name)
    sampling = Sampling(max_tokens=40, temperature=temperature)
    completions = m.engine.generate(m.prompts, 3, sampling, (0, 1))
    owner = [p for p, group in enumerate(completions) for _ in group]
    batch = Batch([p.tokens for p in m.prompts], [c.tokens for g in completions for c in g], owner)
    stored = torch.tensor([logp for group in completions for c in group for logp in c.logps])
    assert (m.policy.score(batch, temperature) - stored).abs().max() < 1e-4
    with torch.no_grad():
        assert (naive_logprobs(plain(m.policy.model), batch, temperature)[0] - stored).abs().max() < 1e-4


def test_a_run_goes_on_from_its_state_in_the_middle_of_a_rollout() -> None:
    one = method(updates_per_rollout=2, epochs=2, variant="dapo")
    for step in range(1, 4):
        one.step(step, 1e-3, quiet)
    state, tensors = json.loads(json.dumps(one.state())), one.policy.state()
    tensors = {name: t.clone() for name, t in tensors.items()}
    other = method(updates_per_rollout=2, epochs=2, variant="dapo")
    other.policy.load_state(tensors, one.policy.version)
    other.load_state(state)
    for step in range(4, 8):
        records = [m.step(step, 1e-3, quiet).record for m in (one, other)]
        a, b = ({k: v for k, v in r.items() if not k.startswith("time/")} for r in records)
        assert a == b
    for p, q in zip(one.policy.model.parameters(), other.policy.model.parameters()):
        assert torch.equal(p, q)


# -- rewards that are missing -----------------------------------------------------------------------------------------


def test_a_failed_reward_leaves_its_group_and_the_loss() -> None:
    def flaky(prompt: Prompt, g: int, completion: Completion) -> float:
        return math.nan if g == 1 else even(prompt, g, completion)

    m = method(flaky)
    (groups,), result = collect(m)
    whole = method()
    (complete,), _ = collect(whole)
    for group, other in zip(groups, complete):
        assert group.completions == [c for g, c in enumerate(other.completions) if g != 1]
        rewards = [even(group.prompt, 0, c) for c in group.completions]
        assert group.advantages == pytest.approx(hand_advantages("grpo", [rewards])[0], abs=1e-5)
    assert result.record["reward/failed"] == 4
    rewards = [even(g.prompt, 0, c) for g in groups for c in g.completions]
    assert result.record["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert [row["reward"] is None for row in result.rollouts] == [False, True, False, False] * 4
    lengths = sum(len(c.tokens) for g in complete for c in g.completions)
    assert result.record["tokens/completion"] == lengths, "what was sampled counts, scored or not"
    assert batch_of(groups)[0].lengths_N == [len(c.tokens) for g in groups for c in g.completions]
    record = m.step(1, 1e-3, quiet).record
    assert all(math.isfinite(v) for v in record.values())


def test_too_many_failures_stop_it_and_a_reward_that_never_applies_is_named() -> None:
    with pytest.raises(UserError, match="failed on 4 of 16"):
        method(lambda p, g, c: math.nan if g == 0 else 1.0, max_reward_failures=0.2).step(1, 1e-3, quiet)
    with pytest.raises(UserError, match="no completion sampled at step 1 has a reward"):
        method(lambda p, g, c: None).step(1, 1e-3, quiet)
    record = method(lambda p, g, c: None if p.index % 2 else float(g)).step(1, 1e-3, quiet).record
    assert record["reward/mean"] == pytest.approx(1.5) and record["reward/failed"] == 0


# -- dynamic sampling, length, truncation -----------------------------------------------------------------------------


def test_dynamic_sampling_replaces_groups_that_agree() -> None:
    def half(prompt: Prompt, g: int, completion: Completion) -> float:
        return float(g % 2) if prompt.index % 2 else 1.0

    m = method(half, dynamic_sampling=True, prompts=16)
    (groups,), result = collect(m)
    assert len(groups) == 4 and all(group.prompt.index % 2 for group in groups)
    rounds = result.record["groups/resampled"] + 1
    assert rounds > 1 and m.cursor == 4 * rounds and len(result.rollouts) == 16 * rounds
    assert result.record["groups/zero_std_high"] == pytest.approx(
        sum(row["prompt_index"] % 2 == 0 for row in result.rollouts) / len(result.rollouts)
    )
    assert result.record["groups/zero_std_low"] == 0
    streams = {(row["prompt_index"], row["sample"], row["completion"]) for row in result.rollouts}
    assert len(streams) == len(result.rollouts), "a prompt that comes up again is sampled anew"


def test_dynamic_sampling_gives_up_after_its_rounds() -> None:
    m = method(lambda p, g, c: 0.0, dynamic_sampling=True, max_resamples=2)
    before = [p.clone() for p in m.policy.model.parameters()]
    record = m.step(1, 1e-2, quiet).record
    assert record["groups/resampled"] == 2 and record["groups/zero_std_low"] == 1 and record["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(m.policy.model.parameters(), before))
    assert record["loss"] == 0 and "clip/fraction" in record


def test_without_it_groups_that_agree_teach_nothing_but_count() -> None:
    m = method(lambda p, g, c: float(p.index % 2))
    record = m.step(1, 1e-2, quiet).record
    assert "groups/resampled" not in record
    assert record["groups/zero_std_high"] + record["groups/zero_std_low"] == 1
    assert record["groups/zero_std_high"] == pytest.approx(record["reward/mean"])
    assert record["grad_norm"] == 0 and record["reward/mean"] > 0


def test_overlong_completions_lose_reward_softly() -> None:
    m = method(lambda p, g, c: 1.0, overlong_tokens=6)
    (groups,), result = collect(m)
    for group in groups:
        lengths = [len(c.tokens) for c in group.completions]
        rewards = [1 + max(-1.0, min(0.0, (MAX_TOKENS - 6 - n) / 6)) for n in lengths]
        assert group.advantages == pytest.approx(hand_advantages("grpo", [rewards])[0], abs=2e-4)
    lengths = [len(c.tokens) for g in groups for c in g.completions]
    assert len(set(lengths)) > 1 and max(lengths) == MAX_TOKENS
    assert result.record["reward/overlong_penalty"] < 0 and result.record["reward/mean"] == 1.0


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_truncated_completions_can_be_left_out_of_the_loss(aggregate: str) -> None:
    m = method(mask_truncated=True, aggregate=aggregate)
    gradients = with_gradients(m)
    (groups,), result = collect(m)
    twin = plain(m.policy.model)
    batch, advantages, _, _ = batch_of(groups)
    logps = naive_logprobs(twin, batch, HEAT)[0].split(batch.lengths_N)
    kept = [c.stop != "length" for g in groups for c in g.completions]
    assert 0 < sum(kept) < len(kept) and result.record["length/truncated"] == pytest.approx(1 - sum(kept) / len(kept))
    own = [(logp, a) for logp, a, keep in zip(logps, advantages.tolist(), kept) if keep]
    if aggregate == "token":
        loss = sum(-a * logp.sum() for logp, a in own) / sum(len(logp) for logp, _ in own)
    elif aggregate == "sequence":
        loss = sum(-a * logp.mean() for logp, a in own) / len(own)
    else:
        loss = sum(-a * logp.sum() for logp, a in own) / (len(kept) * MAX_TOKENS)
    loss.backward()  # type: ignore[union-attr]
    m.step(1, 1e-3, quiet)
    for name, p in twin.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 2e-4 * p.grad.norm() + 1e-7, name


def test_a_batch_of_only_truncated_completions_moves_nothing() -> None:
    m = method(mask_truncated=True, max_tokens=1)
    m.engine.end_ids = frozenset()  # type: ignore[attr-defined]
    before = [p.clone() for p in m.policy.model.parameters()]
    record = m.step(1, 1e-2, quiet).record
    assert record["length/truncated"] == 1 and record["loss"] == 0 and record["grad_norm"] == 0
    assert all(torch.equal(p, q) for p, q in zip(m.policy.model.parameters(), before))


# -- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["copy", "offload"])
def test_kl_to_the_reference_starts_at_0_and_grows(reference: str) -> None:
    m = method(reference=reference)
    first, second = (m.step(step, 1e-2, quiet).record for step in (1, 2))
    assert abs(first["kl/ref"]) < 1e-9 and abs(first["kl/ref_k1"]) < 1e-4
    assert second["kl/ref"] > 0.01


def test_without_beta_the_reference_is_asked_only_every_so_often() -> None:
    m = method(kl_every=3)
    assert ["kl/ref" in m.step(step, 1e-3, quiet).record for step in range(1, 7)] == [False, False, True] * 2
    m = method(kl_every=3, beta=0.1)
    assert all("kl/ref" in m.step(step, 1e-3, quiet).record for step in range(1, 4))


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_a_moving_reference_follows(mix: float) -> None:
    m = method(reference_every=2, reference_mix=mix)
    start = [p.clone() for p in m.policy._reference.parameters()]
    m.step(1, 1e-2, quiet)
    assert all(torch.equal(p, q) for p, q in zip(m.policy._reference.parameters(), start))
    m.step(2, 1e-2, quiet)
    for now, then, policy in zip(m.policy._reference.parameters(), start, m.policy.model.parameters()):
        assert torch.allclose(now, mix * policy + (1 - mix) * then, atol=1e-6)
    if mix == 1:
        assert m.step(3, 1e-2, quiet).record["kl/ref"] < 1e-9


def test_kl_in_the_loss_and_in_the_reward_hold_the_policy_back() -> None:
    def drift(**settings: Any) -> float:
        m = method(lambda p, g, c: 10 * even(p, g, c), scale="none", **settings)
        return [m.step(step, 3e-3, quiet).record for step in range(1, 16)][-1]["kl/ref"]

    free = drift()
    assert drift(beta=5.0) < 0.5 * free
    assert drift(beta=5.0, kl_in="reward") < 0.7 * free


def test_the_entropy_bonus_raises_entropy() -> None:
    def last(bonus: float) -> float:
        m = method(lambda p, g, c: 0.0, entropy_bonus=bonus)
        return [m.step(step, 1e-2, quiet).record["entropy"] for step in range(1, 11)][-1]

    assert last(0.1) > last(0.0) + 0.08


# -- another engine ---------------------------------------------------------------------------------------------------


def test_samples_of_another_engine_are_weighed() -> None:
    """An engine whose log-probs are off by a known amount per token: the loss has the truncated ratio as a factor."""
    shift = math.log(1.5)
    records = {}
    for exact in (True, False):
        m = method()
        m.engine.exact = exact  # type: ignore[misc]
        gradients = with_gradients(m)
        (groups,), _ = collect(m)
        for group in groups:
            group.completions[:] = [
                Completion(c.tokens, tuple(p - shift for p in c.logps), c.stop, c.version, c.text)
                for c in group.completions
            ]
        records[exact] = m.step(1, 1e-3, quiet).record, dict(gradients)
    for name, expected in records[True][1].items():
        assert (records[False][1][name] - 1.5 * expected).norm() <= 1e-4 * expected.norm() + 1e-8
    assert records[False][0]["kl/sampler"] == pytest.approx(0.5 - shift, rel=1e-3)  # w − 1 − log w


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(variant: str) -> None:
    m = method(variant=variant, prompts_per_step=8, prompts=16, updates_per_rollout=2, overlong_tokens=0)
    rewards = [m.step(step, 3e-3, quiet).record.get("reward/mean") for step in range(1, 41)]
    sampled = [r for r in rewards if r is not None]
    assert len(sampled) == 20
    assert sum(sampled[-3:]) / 3 > sum(sampled[:3]) / 3 + 0.2
