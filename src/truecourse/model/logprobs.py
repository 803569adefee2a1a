"""Log-probs of given tokens: the only path, for old, current and reference policies, scoring and training alike.

The trunk runs over the packed row (model/attention.py); the head is applied in float32, chunk by chunk, so a
`[tokens, vocabulary]` matrix is never held: the forward keeps each token's log-sum-exp, the backward computes a
chunk's logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truecourse.data.sequences import Batch
from truecourse.errors import UserError
from truecourse.model import attention

CHUNK_ELEMENTS = 1 << 24
"""Most logits held at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Head:
    """A model's map from hidden states to logits, with the changes some families make to them."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    """Logits are multiplied by this (Cohere's logit_scale, Granite's 1 / logits_scaling)."""
    softcap: float | None
    """Then they become softcap·tanh(logit / softcap) (Gemma 2)."""

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Float32 logits `[X, V]`."""
        return _bend(_linear(hidden_XD, self.weight_VD.float(), self.bias_V), self.scale, self.softcap)[0]


def head_of(model: nn.Module) -> Head:
    """The head of a Hugging Face causal LM. Raises `UserError` where it is not a plain linear layer."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(layer) is not nn.Linear:
        raise UserError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}, not a plain linear layer; "
            "leave the head out of the adapter's `targets` and out of quantisation"
        )
    config: Any = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def trunk(model: nn.Module, tokens_1S: Tensor, positions_1S: Tensor, layout: attention.Layout) -> Tensor:
    """Hidden states `[S, D]` behind the last norm, attending by `layout`."""
    base: Any = model.base_model
    with attention.using(layout):
        return base(input_ids=tokens_1S, position_ids=positions_1S, use_cache=False).last_hidden_state[0]


class Scores(NamedTuple):
    logp_T: Tensor
    """Log-prob (nats) of each completion token, float32."""
    entropy_T: Tensor
    """Entropy (nats) of the distribution each token was drawn from, float32."""


def score(model: nn.Module, head: Head, batch: Batch, temperature: float = 1.0, *, packed: bool = True) -> Scores:
    """Log-probs and entropies of all completion tokens of `batch`, in its order, at the sampling temperature.

    `packed=False` is for models that do not go through transformers' attention registry: one padded row for each
    completion, the model's own attention, the same numbers.
    """
    device = head.weight_VD.device
    if packed:
        layout = attention.Packed(batch, device)
        hidden_SD = trunk(model, layout.tokens, layout.positions, layout)
        hidden_TD, targets_T = hidden_SD.index_select(0, layout.predictors_T), layout.targets_T
    else:
        hidden_TD, targets_T = _padded(model, batch, device)
    return Scores(
        *_TokenScores.apply(hidden_TD, head.weight_VD, head.bias_V, targets_T, temperature, head.scale, head.softcap)
    )


def _padded(model: nn.Module, batch: Batch, device: Any) -> tuple[Tensor, Tensor]:
    rows = [[*batch.prompts[o], *c] for o, c in zip(batch.owner, batch.completions)]
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    here = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    base: Any = model.base_model
    hidden = base(input_ids=tokens, attention_mask=here, use_cache=False).last_hidden_state
    pieces = [hidden[i, len(batch.prompts[o]) - 1 : len(row) - 1] for i, (o, row) in enumerate(zip(batch.owner, rows))]
    return torch.cat(pieces), torch.tensor([t for c in batch.completions for t in c], device=device)


def _linear(hidden: Tensor, weight_float: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden.float(), weight_float, None if bias is None else bias.float())


def _bend(logits: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits, and the cap's tanh for its derivative."""
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, None
    tanh = torch.tanh(logits / softcap)
    return softcap * tanh, tanh


class _TokenScores(torch.autograd.Function):
    """hidden `[T, D]` to (log-prob `[T]`, entropy `[T]`) by chunks of tokens.

    With z the logits over temperature τ, p = softmax(z), H the entropy:
    ∂logp/∂z = onehot − p and ∂H/∂z = −p·(log p + H).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        temperature: float, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight_float, rows = weight.float(), max(1, CHUNK_ELEMENTS // weight.shape[0])
        logps, entropies, lses = [], [], []
        for h, t in zip(hidden.split(rows), targets.split(rows)):
            z = _bend(_linear(h, weight_float, bias), scale, softcap)[0]
            if temperature != 1.0:
                z.div_(temperature)
            top = z.amax(-1, keepdim=True)
            p = z.sub_(top).exp()  # but for its sum
            total = p.sum(-1)
            log_total = total.log()
            logps.append(z.gather(1, t[:, None])[:, 0] - log_total)
            entropies.append(log_total - torch.linalg.vecdot(p, z) / total)
            lses.append(log_total + top[:, 0])
        entropy, lse = torch.cat(entropies), torch.cat(lses)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.settings = temperature, scale, softcap, rows
        return torch.cat(logps), entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, scale, softcap, rows = ctx.settings
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        weight_float = weight.float()
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight_float) if want_weight else None
        d_bias = torch.zeros(weight.shape[0], device=weight.device) if want_bias else None
        through_entropy = bool(grad_entropy.any())
        for start in range(0, len(targets), rows):
            cut = slice(start, start + rows)
            h = hidden[cut]
            z, tanh = _bend(_linear(h, weight_float, bias), scale, softcap)
            log_p = (z.div_(temperature) if temperature != 1.0 else z).sub_(lse[cut, None])
            by_p = -grad_logp[cut, None]
            if through_entropy:
                by_p = by_p - (log_p + entropy[cut, None]) * grad_entropy[cut, None]
            d_z = log_p.exp_().mul_(by_p).scatter_add_(1, targets[cut, None], grad_logp[cut, None])
            if tanh is not None:
                d_z *= 1 - tanh * tanh
            if scale != temperature:
                d_z *= scale / temperature
            if d_hidden is not None:
                d_hidden[cut] = d_z @ weight_float
            if d_weight is not None:
                d_weight.addmm_(d_z.T, h.float())
            if d_bias is not None:
                d_bias += d_z.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip


def seam_holds(model: nn.Module, head: Head) -> float:
    """Largest difference (nats) between packed log-probs and the model's own forward on two short sequences.

    Two prompts, one of them shared, of lengths that cross a short sliding window. Costs milliseconds; catches a model
    whose attention or head does something that the packed path does not honour.
    """
    config: Any = model.config
    device, vocabulary = head.weight_VD.device, int(head.weight_VD.shape[0])
    longest = min(getattr(config, "max_position_embeddings", None) or 64, 64)
    n = max(2, min(24, longest // 2))
    draw = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randint(vocabulary, (k,), generator=draw).tolist() for k in (n, 3, n, 2))
    batch = Batch(prompts=[a, b], completions=[d, c, d], owner=[0, 0, 1])
    was = config._attn_implementation
    with torch.no_grad():
        ours = score(model, head, batch).logp_T
        model.set_attn_implementation("eager" if was == attention.NAME else was)  # type: ignore[operator]
        theirs = []
        for o, completion in zip(batch.owner, batch.completions):
            row = torch.tensor([[*batch.prompts[o], *completion]], device=device)
            logits = model(input_ids=row, use_cache=False).logits[0, len(batch.prompts[o]) - 1 : -1]
            theirs.append(
                logits.float().log_softmax(-1).gather(1, torch.tensor(completion, device=device)[:, None])[:, 0]
            )
        model.set_attn_implementation(was)  # type: ignore[operator]
    return float((ours - torch.cat(theirs)).abs().max())
