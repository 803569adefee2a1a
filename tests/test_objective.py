"""The objective against enumeration: expectations are summed over every outcome, never sampled."""

import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from truecourse.objective import advantages, kl, surrogate
from truecourse.objective.advantages import dead_groups, group_advantages
from truecourse.objective.kl import kl_values
from truecourse.objective.surrogate import (
    effective_sample_size,
    importance_ratio,
    overlong_penalty,
    segment_mean,
    segment_sum,
    spread,
    token_weights,
    truncated_importance_weights,
)
from truecourse.objective.surrogate import surrogate as surrogate_loss

KINDS = ("k1", "k2", "k3")
close = torch.testing.assert_close


def grad(loss: Tensor, of: list[Tensor]) -> Tensor:
    parts = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(of, parts)])


class Sequences:
    """A policy over sequences of one or two tokens out of V, small enough to list them all.

    Token 0 ends a sequence, so lengths differ; without `end` every sequence has two tokens.
    """

    def __init__(self, V: int, seed: int, end: bool = True):
        g = torch.Generator().manual_seed(seed)
        self.parameters = [torch.randn(n, V, generator=g, dtype=torch.double).requires_grad_() for n in (1, V)]
        self.outcomes = [(a,) for a in range(V) if end and a == 0]
        self.outcomes += [(a, b) for a in range(V) if not (end and a == 0) for b in range(V)]
        self.lengths_N = [len(o) for o in self.outcomes]

    def logp_T(self) -> Tensor:
        """Token log-probs of every outcome, end to end."""
        first, second = (p.log_softmax(-1) for p in self.parameters)
        return torch.stack([x for o in self.outcomes for x in ([first[0, o[0]]] + [second[o[0], b] for b in o[1:]])])

    def prob_N(self) -> Tensor:
        return segment_sum(self.logp_T(), self.lengths_N).exp()


# -- KL ---------------------------------------------------------------------------------------------------------------


def categorical(seed: int, V: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(V, generator=g, dtype=torch.double)).log_softmax(-1)


def test_kl_of_one_token_by_enumeration():
    logits, ref = categorical(0).clone().requires_grad_(), categorical(1)
    logp = logits.log_softmax(-1)
    p, q = logp.exp(), ref.exp()
    reverse, forward = (p * (logp - ref)).sum(), (q * (ref - logp)).sum()
    value = {kind: (p * kl_values(logp, ref, kind)).sum() for kind in KINDS}
    close(value["k1"], reverse)
    close(value["k3"], reverse)
    assert abs(value["k2"] - reverse) > 0.05 * reverse, "k2 is biased as a value"
    assert (kl_values(logp, ref, "k3") >= 0).all() and (kl_values(logp, ref, "k2") >= 0).all()

    as_loss = {kind: grad((p.detach() * kl_values(logp, ref, kind)).sum(), [logits]) for kind in KINDS}
    exact = grad(reverse, [logits])
    close(as_loss["k1"], torch.zeros(5, dtype=torch.double))
    close(as_loss["k2"], exact)
    close(as_loss["k3"], grad(forward, [logits]))
    assert (as_loss["k3"] - exact).norm() > 0.1 * exact.norm()


def test_kl_loss_off_policy_is_exact_with_the_ratio():
    logits, ref, old = categorical(0).clone().requires_grad_(), categorical(1), categorical(2)
    logp = logits.log_softmax(-1)
    exact = grad((logp.exp() * (logp - ref)).sum(), [logits])
    ratio = importance_ratio(logp, old, [1] * 5, "token")
    close(grad((old.exp() * ratio.detach() * kl_values(logp, ref, "k2")).sum(), [logits]), exact)
    close(grad((old.exp() * ratio * kl_values(logp, ref, "k3")).sum(), [logits]), exact)
    bare = grad((old.exp() * kl_values(logp, ref, "k2")).sum(), [logits])
    assert (bare - exact).norm() > 0.1 * exact.norm(), "old samples without the ratio are biased"


@pytest.mark.parametrize("end", [False, True])
def test_kl_of_sequences_by_enumeration(end: bool):
    policy, reference = Sequences(5, 0, end), Sequences(5, 1, end)
    lengths, of = policy.lengths_N, policy.parameters
    logp_T, ref_T = policy.logp_T(), reference.logp_T().detach()
    p, q = policy.prob_N(), reference.prob_N().detach()
    logp, ref = segment_sum(logp_T, lengths), segment_sum(ref_T, lengths)
    close(p.sum().item(), 1.0)
    reverse, forward = (p * (logp - ref)).sum(), (q * (ref - logp)).sum()

    # token estimates summed over the sequence, and one estimate of the whole sequence
    tokens = {kind: segment_sum(kl_values(logp_T, ref_T, kind), lengths) for kind in KINDS}
    whole = {kind: kl_values(logp, ref, kind) for kind in KINDS}
    for estimate in (tokens["k1"], tokens["k3"], whole["k1"], whole["k3"]):
        close((p * estimate).sum(), reverse)

    def as_loss(estimate_N: Tensor) -> Tensor:
        return grad((p.detach() * estimate_N).sum(), of)

    exact = grad(reverse, of)
    close(as_loss(whole["k1"]), torch.zeros_like(exact))
    close(as_loss(tokens["k1"]), torch.zeros_like(exact))
    close(as_loss(whole["k2"]), exact)
    close(as_loss(whole["k3"]), grad(forward, of))

    # per token: each token's KL at the prefixes visited, these held fixed
    first, second = (t.log_softmax(-1) for t in of)
    ref_first, ref_second = (t.detach().log_softmax(-1) for t in reference.parameters)
    reach = first[0].detach().exp()
    if end:
        reach = reach * (torch.arange(5) > 0)
    step = (first.exp() * (first - ref_first)).sum() + (reach @ (second.exp() * (second - ref_second))).sum()
    back = (ref_first.exp() * (ref_first - first)).sum() + (reach @ (ref_second.exp() * (ref_second - second))).sum()
    close(as_loss(tokens["k2"]), grad(step, of))
    close(as_loss(tokens["k3"]), grad(back, of))
    assert (as_loss(tokens["k2"]) - exact).norm() > 0.01 * exact.norm(), "prefixes count too"


# -- advantages -------------------------------------------------------------------------------------------------------

EXAMPLE = [0.2, 0.8, 0.5, 0.3]
BASELINES, SCALES = ("mean", "leave_one_out", "none"), ("sample", "population", "batch", "none")


def test_the_worked_group():
    for scale, expected in (
        ("sample", [-0.945, 1.323, 0.189, -0.567]),
        ("population", [-1.091, 1.528, 0.218, -0.655]),
    ):
        got = group_advantages(torch.tensor([EXAMPLE]), baseline="mean", scale=scale, epsilon=0.0)
        close(got, torch.tensor([expected]), atol=5e-4, rtol=0)
    for scale, std in (("sample", 0.2646), ("population", 0.2291)):
        got = group_advantages(torch.tensor([EXAMPLE]), baseline="mean", scale=scale)
        close(got, (torch.tensor([EXAMPLE]) - 0.45) / (std + 1e-4), atol=5e-4, rtol=0)


def brute_advantages(rewards: list[list[float]], baseline: str, scale: str, epsilon: float) -> list[list[float]]:
    """Scalars and loops, for NaN-marked failures."""
    ok = [[r for r in row if r == r] for row in rewards]
    every = [r for row in ok for r in row]
    out = []
    for row, good in zip(rewards, ok):
        line = []
        for r in row:
            grouped = baseline != "none" or scale in ("sample", "population")
            if r != r or (grouped and len(set(good)) < 2):
                line.append(0.0)
                continue
            others = list(good)
            others.remove(r)
            base = {
                "mean": lambda good=good: math.fsum(good) / len(good),
                "leave_one_out": lambda others=others: math.fsum(others) / len(others),
                "none": lambda: math.fsum(every) / len(every) if scale == "batch" else 0.0,
            }[baseline]()
            sample = every if scale == "batch" else good
            divisor = 1.0
            if scale != "none":
                mean = math.fsum(sample) / len(sample)
                freedom = len(sample) - (scale != "population")
                divisor = math.sqrt(math.fsum((x - mean) ** 2 for x in sample) / freedom) + epsilon
            line.append((r - base) / divisor)
        out.append(line)
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_against_loops(baseline: str, scale: str):
    nan = math.nan
    rewards = [
        [0.2, 0.8, 0.5, 0.3],
        [1, 0, nan, 0],
        [0.1, nan, 0.1, 0.1],
        [nan, nan, nan, 0.7],
        [nan] * 4,
        [-2, 3, 3, 3],
    ]
    got = group_advantages(torch.tensor(rewards), baseline=baseline, scale=scale)
    close(got, torch.tensor(brute_advantages(rewards, baseline, scale, 1e-4)), atol=2e-6, rtol=1e-5)
    assert (got[torch.tensor(rewards).isnan()] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_groups_that_agree_give_exactly_zero(baseline: str, scale: str, dtype: torch.dtype):
    noisy = [0.1 + 0.2, 0.3, 0.15 * 2]  # differ in the last bit
    rewards = torch.tensor([[0.1] * 3, noisy, [1e6 + 0.1] * 3, [0.0] * 3, [0.0, 1.0, 0.0]], dtype=dtype)
    got = group_advantages(rewards, baseline=baseline, scale=scale)
    assert (got[:4] == 0).all() and (got[4] != 0).all()
    assert (group_advantages(rewards[:1], baseline=baseline, scale=scale) == 0).all()


def test_small_differences_still_count():
    got = group_advantages(torch.tensor([[1.0, 1.0, 1.00001]]), baseline="mean", scale="sample", epsilon=0.0)
    assert got[0, 2] > 1


@pytest.mark.parametrize("baseline,scale", [*itertools.product(BASELINES[:2], SCALES), ("none", "batch")])
def test_a_constant_added_to_rewards_changes_nothing(baseline: str, scale: str):
    rewards = torch.tensor([EXAMPLE, [1.0, 0.0, 0.0, 0.0]])
    before = group_advantages(rewards, baseline=baseline, scale=scale)
    close(group_advantages(rewards + 8.0, baseline=baseline, scale=scale), before, atol=2e-5, rtol=0)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    junk = rewards.masked_fill(~mask, 99.0)
    left_out = group_advantages(rewards.masked_fill(~mask, math.nan), baseline=baseline, scale=scale)
    close(group_advantages(junk, baseline=baseline, scale=scale, valid_PG=mask), left_out)


def test_dead_groups_are_told_high_from_low():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, nan], [0, 1, 0], [nan, nan, 1], [0.1, 0.1, 0.1]])
    high, low = dead_groups(rewards)
    assert high.tolist() == [True, False, False, False, False] and low.tolist() == [False, True, False, False, True]
    high, low = dead_groups(rewards, high=0.05)
    assert high.tolist() == [True, False, False, False, True] and low.tolist() == [False, True, False, False, False]
    rounded = torch.full((1, 3), 0.7)  # a little below 0.7 in float32
    assert dead_groups(rounded, high=0.7)[0].item()
    for value, is_high in ((1.0, True), (0.0, False), (-1.0, False)):
        high, low = dead_groups(torch.full((2, 3), value))
        assert high.tolist() == [is_high] * 2 and low.tolist() == [not is_high] * 2
    alive = ~(group_advantages(rewards, baseline="mean", scale="sample") == 0).all(1)
    high, low = dead_groups(rewards)
    assert not (alive & (high | low)).any()


# -- the policy gradient ----------------------------------------------------------------------------------------------


def expected_gradient(
    policy: Sequences, rewards_N: Tensor, G: int, how: str, loss: str, level: str, **advantage: str
) -> Tensor:
    """Exact expectation of the group loss's gradient, over every group of G outcomes."""
    logp_T, prob_N, lengths = policy.logp_T(), policy.prob_N().detach(), torch.tensor(policy.lengths_N)
    pieces = logp_T.split(policy.lengths_N)
    total = torch.zeros((), dtype=torch.double)
    for group in itertools.product(range(len(lengths)), repeat=G):
        index = torch.tensor(group)
        adv = group_advantages(rewards_N[index][None], **advantage)[0]
        lp = torch.cat([pieces[i] for i in group])
        values, _ = surrogate_loss(
            lp, lp.detach(), spread(adv, lengths[index]), lengths[index],
            loss=loss, level=level, clip_low=0.2, clip_high=0.2,
        )  # fmt: skip
        weights = token_weights(lengths[index], how, max_tokens=1)
        total = total + prob_N[index].prod() * (values * weights).sum()
    return grad(total, policy.parameters)


@pytest.mark.parametrize("loss", ["clip", "cispo", "reinforce"])
@pytest.mark.parametrize("G", [2, 3])
def test_the_expected_loss_gradient_is_that_of_j(G: int, loss: str):
    policy = Sequences(3, 3)
    rewards_N = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, 0.7, -1.1], dtype=torch.double)
    j = grad((policy.prob_N() * rewards_N).sum(), policy.parameters)
    exact = {"atol": 1e-6, "rtol": 1e-5}  # advantages and weights are float32
    loo = expected_gradient(policy, rewards_N, G, "constant", loss, "token", baseline="leave_one_out", scale="none")
    close(loo, -j, **exact)
    if G == 2:
        mean = expected_gradient(policy, rewards_N, G, "constant", loss, "token", baseline="mean", scale="none")
        close(mean, -j * (G - 1) / G, **exact)
        bare = expected_gradient(policy, rewards_N, G, "constant", loss, "token", baseline="none", scale="none")
        close(bare, -j, **exact)
        by_token = expected_gradient(policy, rewards_N, G, "token", loss, "token", baseline="none", scale="none")
        assert torch.cosine_similarity(by_token, -j, dim=0) < 0.999, "a token mean weighs sequences by length"


def test_on_policy_the_ratio_is_one_and_levels_agree():
    torch.manual_seed(0)
    lengths = [3, 1, 4]
    for level in ("token", "sequence"):
        logp = torch.randn(8).requires_grad_()
        ratio = importance_ratio(logp, logp.detach(), lengths, level)
        assert (ratio == 1).all()
    logp = torch.randn(8).requires_grad_()
    adv = spread(torch.tensor([1.0, -2.0, 0.5]), lengths)
    weights = token_weights(lengths, "sequence")
    found = []
    for loss, level in itertools.product(("clip", "cispo", "reinforce"), ("token", "sequence")):
        values, clipped = surrogate_loss(
            logp, logp.detach(), adv, lengths, loss=loss, level=level, clip_low=0.2, clip_high=0.3
        )
        assert not clipped.any()
        found.append(grad((values * weights).sum(), [logp]))
        close(found[-1], found[0])


# -- the surrogate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low,high", [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5), (1.0, 2.0)])
def test_the_clip_against_scalars(low: float, high: float):
    ratios = [0.05, 0.75, 0.85, 1.0, 1.15, 1.25, 1.4, 1.7, 3.5]
    cases = [(r, a) for r in ratios for a in (-1.5, 0.0, 2.0)]
    n = len(cases)
    old = torch.full((n,), -2.0, dtype=torch.double)
    logp = (torch.tensor([math.log(r) for r, _ in cases], dtype=torch.double) + old).requires_grad_()
    adv = torch.tensor([a for _, a in cases], dtype=torch.double)
    kw = {"level": "token", "clip_low": low, "clip_high": high}

    values, clipped = surrogate_loss(logp, old, adv, [n], loss="clip", **kw)
    slope = grad(values.sum(), [logp])
    for i, (r, a) in enumerate(cases):
        bounded = min(max(r, 1 - low), 1 + high)
        assert values[i].item() == pytest.approx(-min(r * a, bounded * a))
        cut = (r > 1 + high and a > 0) or (r < 1 - low and a < 0)
        assert clipped[i].item() is cut
        assert slope[i].item() == pytest.approx(0.0 if cut else -r * a)

    values, clipped = surrogate_loss(logp, old, adv, [n], loss="cispo", **kw)
    slope = grad(values.sum(), [logp])
    for i, (r, a) in enumerate(cases):
        bounded = min(max(r, 1 - low), 1 + high)
        assert values[i].item() == pytest.approx(-bounded * a * logp[i].item())
        assert slope[i].item() == pytest.approx(-bounded * a), "every token keeps a gradient"
        assert clipped[i].item() is not (1 - low <= r <= 1 + high)


def test_the_sequence_ratio_is_a_geometric_mean():
    logp, old = torch.tensor([-1.0, -2.0, -0.5]).requires_grad_(), torch.tensor([-1.5, -1.0, -0.2])
    ratio = importance_ratio(logp, old, [2, 1], "sequence")
    whole = math.exp(-0.25)  # (0.5 − 1) / 2
    close(ratio, torch.tensor([whole, whole, math.exp(-0.3)]))
    close(grad(ratio[0], [logp]), torch.tensor([whole / 2, whole / 2, 0.0]))


def test_segments():
    torch.manual_seed(0)
    lengths, values = [2, 1, 5], torch.randn(8, dtype=torch.double, requires_grad=True)
    loop = torch.stack([piece.sum() for piece in values.split(lengths)])
    close(segment_sum(values, lengths), loop)
    close(segment_mean(values, torch.tensor(lengths)), loop / torch.tensor(lengths))
    close(spread(torch.tensor([1.0, 2, 3]), lengths), torch.tensor([1.0, 1, 2, 3, 3, 3, 3, 3]))
    assert torch.autograd.gradcheck(lambda v: segment_mean(v, lengths), values)


def test_token_weights_say_whose_mean_it_is():
    lengths, valid = [2, 1, 3], [True, False, True]
    third, sixth = 1 / 3, 1 / 6
    for how, expected in (
        ("token", [sixth] * 6),
        ("sequence", [sixth, sixth, third, 1 / 9, 1 / 9, 1 / 9]),
        ("constant", [1 / 30] * 6),
    ):
        close(token_weights(lengths, how, max_tokens=10), torch.tensor(expected))
    for how, expected in (
        ("token", [0.2, 0.2, 0, 0.2, 0.2, 0.2]),
        ("sequence", [0.25, 0.25, 0, sixth, sixth, sixth]),
        ("constant", [1 / 30, 1 / 30, 0, 1 / 30, 1 / 30, 1 / 30]),
    ):
        close(token_weights(lengths, how, max_tokens=10, valid_N=valid), torch.tensor(expected))
        close(token_weights(torch.tensor(lengths), how, 10, torch.tensor(valid)), torch.tensor(expected))
        assert (token_weights(lengths, how, max_tokens=10, valid_N=[False] * 3) == 0).all()


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("loss,level", itertools.product(("clip", "cispo", "reinforce"), ("token", "sequence")))
def test_gradients_do_not_depend_on_the_cut(how: str, loss: str, level: str):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (16,), generator=g)
    T = int(lengths.sum())
    theta = torch.randn(T, 3, generator=g, dtype=torch.double).requires_grad_()
    logp = theta.log_softmax(-1)[:, 0]
    old = logp.detach() + 0.4 * torch.randn(T, generator=g, dtype=torch.double)
    adv = spread(torch.randn(16, generator=g, dtype=torch.double), lengths)
    weights = token_weights(lengths, how, max_tokens=8, valid_N=torch.rand(16, generator=g) > 0.2)
    kw = {"loss": loss, "level": level, "clip_low": 0.2, "clip_high": 0.28}

    def loss_of(first: int, last: int) -> Tensor:
        here = slice(int(lengths[:first].sum()), int(lengths[:last].sum()))
        values, _ = surrogate_loss(logp[here], old[here], adv[here], lengths[first:last], **kw)
        return (values * weights[here]).sum()

    whole = loss_of(0, 16)
    for cuts in ([0, 5, 16], [0, 1, 2, 9, 15, 16], list(range(17))):
        parts = [loss_of(a, b) for a, b in itertools.pairwise(cuts)]
        close(torch.stack(parts).sum(), whole)
        close(sum(grad(part, [theta]) for part in parts), grad(whole, [theta]))


# -- another sampler, shaping -----------------------------------------------------------------------------------------


def test_truncated_weights_and_what_they_are_worth():
    logp = torch.tensor([-1.0, -1.0, -1.0, 0.0], requires_grad=True)
    weights = truncated_importance_weights(logp, torch.tensor([-1.0, -0.5, -3.0, -1000.0]), cap=2.0)
    close(weights, torch.tensor([1.0, math.exp(-0.5), 2.0, 2.0]))
    assert not weights.requires_grad
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([0.0, -1000.0, -1000.0, -1000.0])) == pytest.approx(0.25)
    w = torch.tensor([0.3, 1.7, 2.0, 0.01])
    kish = (w.sum() ** 2 / (4 * w.square().sum())).item()
    for shift in (0.0, 900.0, -900.0):  # a common factor is nothing, however large
        assert effective_sample_size(w.double().log() + shift) == pytest.approx(kish)
    assert effective_sample_size(torch.full((3,), 0.1)) <= 1


def test_overlong_penalty_is_dapos():
    def dapo(n: int, l_max: int, cache: int) -> float:
        if n <= l_max - cache:
            return 0.0
        return ((l_max - cache) - n) / cache if n <= l_max else -1.0

    lengths = list(range(1, 130))
    close(overlong_penalty(lengths, 100, 20), torch.tensor([dapo(n, 100, 20) for n in lengths]))
    assert overlong_penalty([90, 100], 100, 20).tolist() == [-0.5, -1.0]
    assert (overlong_penalty(lengths, 100, 0) == 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: kl_values(torch.zeros(1), torch.zeros(1), "k4"),
        lambda: group_advantages(torch.zeros(1, 2), baseline="median", scale="none"),
        lambda: group_advantages(torch.zeros(1, 2), baseline="mean", scale="iqr"),
        lambda: token_weights([1], "mean"),
        lambda: importance_ratio(torch.zeros(1), torch.zeros(1), [1], "word"),
        lambda: surrogate_loss(*[torch.zeros(1)] * 3, [1], loss="ppo", level="token", clip_low=0, clip_high=0),
    ],
)
def test_unknown_names_are_refused(call: Callable):
    with pytest.raises(ValueError, match="is not one of"):
        call()


# -- planted faults ---------------------------------------------------------------------------------------------------


def checking(test: Callable, *args) -> Callable:
    return lambda: test(*args)


loops, cut = test_advantages_against_loops, test_the_clip_against_scalars
zero, weigh = test_groups_that_agree_give_exactly_zero, test_token_weights_say_whose_mean_it_is
FAULTS = [
    (advantages, 'int(scale == "sample")', 'int(scale == "population")', test_the_worked_group),
    (advantages, "(count_P1 / (count_P1 - 1).clamp(min=1))", "1",
     checking(test_the_expected_loss_gradient_is_that_of_j, 2, "clip")),
    (advantages, "SAME = 1e-6", "SAME = -1.0", checking(zero, "mean", "sample", torch.float64)),
    (advantages, "SAME = 1e-6", "SAME = 1e-3", test_small_differences_still_count),
    (advantages, ".clamp(min=1)\n    centred", ".clamp(min=4)\n    centred", checking(loops, "mean", "none")),
    (advantages, "(count - 1).clamp", "count.clamp", checking(loops, "mean", "batch")),
    (advantages, "mean_P >= (least + most) / 2", "mean_P > 0", test_dead_groups_are_told_high_from_low),
    (kl, "0.5 * diff_T.square()", "diff_T.square()", test_kl_of_one_token_by_enumeration),
    (kl, "(-diff_T).expm1() + diff_T", "diff_T.expm1() - diff_T", test_kl_of_one_token_by_enumeration),
    (surrogate, "clamp(1 - clip_low, 1 + clip_high)", "clamp(1 - clip_high, 1 + clip_low)", checking(cut, 0.2, 0.28)),
    (surrogate, "torch.minimum", "torch.maximum", checking(cut, 0.2, 0.2)),
    (surrogate, "-bounded_T.detach()", "-bounded_T", checking(cut, 0.2, 0.2)),
    (surrogate, "segment_mean(log_ratio_T", "segment_sum(log_ratio_T",
     test_the_sequence_ratio_is_a_geometric_mean),
    (surrogate, "(counts_N * valid_N).sum()", "counts_N.sum()", weigh),
    (surrogate, "len(counts_N) * max_tokens", "valid_N.sum() * max_tokens", weigh),
    (surrogate, "(logp_T.detach() - sampler_logp_T)", "(sampler_logp_T - logp_T.detach())",
     test_truncated_weights_and_what_they_are_worth),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f[0].__name__.rpartition('.')[2]}-{f[2]}" for f in FAULTS])
def test_planted_faults_are_caught(fault: tuple, monkeypatch: pytest.MonkeyPatch):
    module, right, wrong, check = fault
    check()
    source = inspect.getsource(module)
    assert right in source
    broken = types.ModuleType("broken")
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    for name, value in list(globals().items()):
        if getattr(value, "__module__", None) == module.__name__:
            new = getattr(broken, "surrogate" if name == "surrogate_loss" else name)
            monkeypatch.setattr(sys.modules[__name__], name, new)
    with pytest.raises(AssertionError):
        check()
