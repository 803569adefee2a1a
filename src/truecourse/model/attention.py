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
        prompts = _buckets(list(range(n_prompts)), [(0, int(n)) for n in lengths[:n_prompts]])
        completions = _buckets(
            list(range(n_prompts, len(sequences))),
            [(int(lengths[o]), int(n)) for o, n in zip(batch.owner, lengths[n_prompts:])],
        )
        self._blocks = [_Block(rows, None, starts, lengths, positions) for rows in prompts]
        self._blocks += [_Block(rows, owner[torch.tensor(rows) - n_prompts], starts, lengths, positions)
                         for rows in completions]  # fmt: skip
        queries = torch.cat([block.own.reshape(-1) for block in self._blocks])
        real = torch.cat([block.own_here.reshape(-1) for block in self._blocks]).nonzero()[:, 0]
        back = torch.empty_like(within)
        back[queries[real]] = real  # every place of the row is real in exactly one block
        keys = torch.cat([block.keys.reshape(-1) for block in self._blocks])
        self._queries, self._keys, self._back = (_moved(x, len(flat), device) for x in (queries, keys, back))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (query, key, value))
        queries = _take(q_SHD, self._queries).split([block.own.numel() for block in self._blocks])
        sizes = [block.keys.numel() for block in self._blocks]
        keys, values = _take(k_SKD, self._keys).split(sizes), _take(v_SKD, self._keys).split(sizes)
        pieces = [b.attend(q, k, v, rules) for b, q, k, v in zip(self._blocks, queries, keys, values)]
        return _take(torch.cat(pieces), self._back)[None]


def _moved(index: Tensor, length: int, device: Any) -> Tensor | None:
    """`index` on the device; None where it is every place of a row in order, so that nothing has to move."""
    return None if torch.equal(index, torch.arange(length)) else index.to(device)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


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

    def __init__(self, rows: list[int], prefixes: Tensor | None, starts: Tensor, lengths: Tensor, positions: Tensor):
        index = torch.tensor(rows)
        self.own, self.own_here = _rectangle(starts[index], lengths[index])
        self.keys, keys_here = self.own, self.own_here
        if prefixes is not None:
            before, before_here = _rectangle(starts[prefixes], lengths[prefixes])
            self.keys, keys_here = torch.cat([before, self.own], 1), torch.cat([before_here, keys_here], 1)
        self.plain = prefixes is None  # right-padded and self-contained: plain causal attention will do
        self._q_pos = positions[self.own].int()
        self._k_pos = torch.where(keys_here, positions[self.keys], FAR).int()
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """What is added to the scores, `[B, 1, Q, K]`: 0 where a key is seen, −inf elsewhere."""
        if window not in self._masks:
            back = (self._q_pos[:, None, :, None] - self._k_pos[:, None, None, :]).to(like.device)
            seen = back >= 0 if window is None else (back >= 0) & (back < window)
            seen |= ~seen.any(-1, keepdim=True)  # a padded query sees nothing: let it see all, its output is dropped
            self._masks[window] = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, -torch.inf
            )
        return self._masks[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        """q `[rows · Q, H, D]`, k and v `[rows · K, Hkv, D]` to `[rows · Q, H, D]`."""
        rows = len(self.own)
        q_, k_, v_ = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = None if self.plain and rules.window is None else self.mask(rules.window, q)
        return scaled_attention(q_, k_, v_, mask, rules).transpose(1, 2).flatten(0, 1)


def _rectangle(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the row `[B, L]` of right-padded sequences, and which of them are real."""
    steps = torch.arange(int(lengths.max()))
    here = steps[None] < lengths[:, None]
    return torch.where(here, starts[:, None] + steps, starts[:, None]), here


def scaled_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rules: Rules) -> Tensor:
    """Softmax attention `[B, H, Q, D]`; `mask` is added to the scores, None is causal. Honours `rules`."""
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
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + mask).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
