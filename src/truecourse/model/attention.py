"""The one seam into the models: an attention function registered with transformers under our own name.

A model's forward stays its own. It is handed all tokens as one flat row `[1, T]` with explicit positions, and its
attention layers call `Layout.attend`, which knows which tokens may see which. The layout travels in the place of the
attention mask, so it also reaches layers that are run again by gradient checkpointing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from truecourse.data.sequences import Batch

NAME = "truecourse"
BUCKET_WASTE = 1.25
"""Sequences share a padded attention call while the longest is at most this much longer than the shortest."""
FAR = 1 << 30
"""Position of a padded key: later than any query, so that causality hides it."""


@dataclass(frozen=True)
class Rules:
    """What a model's attention layer asks for beyond plain softmax attention."""

    scaling: float | None
    window: int | None
    """A query sees keys less than this many positions back; None sees all."""
    softcap: float | None
    """Scores become softcap·tanh(score / softcap) (Gemma 2)."""


class Layout(Protocol):
    """Which tokens of the flat row see which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """query `[1, H, T, D]`, key and value `[1, Hkv, T, D]` (positions applied) to `[1, T, H, D]`."""
        ...


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def using(layout: Layout) -> Iterator[None]:
    """Forward passes inside attend by this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


# Handed to attention functions by some models and harmless here: they restate the layout, or concern other kernels.
_IGNORED = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "layer_idx",
            "output_hidden_states", "head_mask", "past_key_values", "token_type_ids", "num_items_in_batch"}  # fmt: skip


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    unknown = {k for k, v in kwargs.items() if v is not None and k not in _IGNORED}
    if unknown:
        raise NotImplementedError(f"attention of {type(module).__name__} asks for {', '.join(sorted(unknown))}")
    assert attention_mask is not None, "a forward outside `using(layout)`"
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise NotImplementedError(f"{type(module).__name__} does not say which layer it is")
    return attention_mask.attend(layer, query, key, value, Rules(scaling, sliding_window, softcap)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: _layout.get())


# -- packed: whole prompts and completions, for scoring and training --------------------------------------------------


class Packed:
    """All prompts of a batch, then all its completions, in one flat row; prompts are run once for their group.

    `tokens` and `positions` are `[1, S]`; `predictors_T` are the places in the row whose hidden state predicts each
    completion token: the prompt's last token for the first one, its predecessor for the others.
    """

    def __init__(self, batch: Batch, device: torch.device | str = "cpu"):
        sequences = [*batch.prompts, *batch.completions]
        lengths = torch.tensor([len(s) for s in sequences])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])[:-1]
        n_prompts = len(batch.prompts)
        owner = torch.tensor(batch.owner, dtype=torch.long)
        offset = torch.cat([torch.zeros(n_prompts, dtype=torch.long), lengths[:n_prompts][owner]])
        within = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        positions = within + offset.repeat_interleave(lengths)

        first = int(lengths[:n_prompts].sum())
        predictors = torch.arange(first, first + int(lengths[n_prompts:].sum())) - 1
        heads = starts[n_prompts:] - first
        predictors[heads] = (starts + lengths - 1)[owner]

        flat = torch.tensor([t for s in sequences for t in s])
        self.tokens, self.positions = flat[None].to(device), positions[None].to(device)
        self.predictors_T, self.targets_T = predictors.to(device), flat[first:].to(device)
        self.prompt_buckets = _buckets(list(range(n_prompts)), [(0, int(n)) for n in lengths[:n_prompts]])
        self.completion_buckets = _buckets(
            list(range(n_prompts, len(sequences))),
            [(int(lengths[o]), int(n)) for o, n in zip(batch.owner, lengths[n_prompts:])],
        )
        self._blocks = [_Block(rows, None, starts, lengths, positions, device) for rows in self.prompt_buckets]
        self._blocks += [_Block(rows, owner[torch.tensor(rows) - n_prompts], starts, lengths, positions, device)
                         for rows in self.completion_buckets]  # fmt: skip

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [S, H, D]
        pieces = [block.attend(q, k, v, rules) for block in self._blocks]
        # every place of the row is in exactly one block: put the pieces back in the row's order
        if not hasattr(self, "_order"):
            self._order = torch.cat([block.places for block in self._blocks]).argsort()
        return torch.cat(pieces).index_select(0, self._order)[None]


def _buckets(rows: list[int], shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Group rows of similar (prefix, own) length, so that padding them together wastes little."""
    order = sorted(range(len(rows)), key=lambda i: shapes[i])
    buckets: list[list[int]] = []
    base = (0, 0)
    for i in order:
        if buckets and all(n <= BUCKET_WASTE * b + 8 for n, b in zip(shapes[i], base)):
            buckets[-1].append(rows[i])
        else:
            buckets.append([rows[i]])
            base = shapes[i]
    return buckets


class _Block:
    """Some sequences of the row, padded to one rectangle, each seeing its prefix (its prompt) and itself."""

    def __init__(
        self, rows: list[int], prefixes: Tensor | None, starts: Tensor, lengths: Tensor, positions: Tensor, device: Any
    ):
        index = torch.tensor(rows)
        own, own_here = _rectangle(starts[index], lengths[index])
        keys, keys_here = own, own_here
        if prefixes is not None:
            before, before_here = _rectangle(starts[prefixes], lengths[prefixes])
            keys, keys_here = torch.cat([before, own], 1), torch.cat([before_here, own_here], 1)
        q_pos = positions[own]
        k_pos = torch.where(keys_here, positions[keys], FAR)
        distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]
        self.plain = prefixes is None  # right-padded and self-contained: plain causal attention will do
        self.shape = own.shape
        self.own, self.keys = own.reshape(-1).to(device), keys.reshape(-1).to(device)
        self.here = own_here.reshape(-1).nonzero()[:, 0].to(device)
        self.places = self.own[self.here]
        self.full = bool(own_here.all())
        self.distance = distance.to(device) if not self.plain else None
        self._lazy = (q_pos, k_pos)
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        if window not in self._masks:
            if self.distance is None:
                q_pos, k_pos = self._lazy
                self.distance = (q_pos[:, None, :, None] - k_pos[:, None, None, :]).to(self.own.device)
            seen = self.distance >= 0
            self._masks[window] = seen if window is None else seen & (self.distance < window)
            # a padded query sees nothing: let it see everything, its output is dropped
            self._masks[window] |= ~self._masks[window].any(-1, keepdim=True)
        return self._masks[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        rows, length = self.shape
        q_, k_, v_ = (
            x.index_select(0, places).view(rows, -1, *x.shape[1:]).transpose(1, 2)
            for x, places in ((q, self.own), (k, self.keys), (v, self.keys))
        )
        plain = self.plain and rules.window is None
        out = scaled_attention(q_, k_, v_, None if plain else self.mask(rules.window), rules)
        out = out.transpose(1, 2).reshape(rows * length, *q.shape[1:-1], -1)
        return out if self.full else out.index_select(0, self.here)


def _rectangle(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the row `[B, L]` of right-padded sequences, and which of them are real."""
    steps = torch.arange(int(lengths.max()))
    here = steps[None] < lengths[:, None]
    return torch.where(here, starts[:, None] + steps, starts[:, None]), here


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
    """Softmax attention `[B, H, Q, D]`; `mask` True where a key is seen, None for causal. Honours `rules`."""
    groups = query.shape[1] // key.shape[1]
    if rules.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=rules.scaling, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling)
    scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (
        scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(value.dtype)
        @ value
    )
