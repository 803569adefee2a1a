"""Two ways of running a model one token at a time: rows that share their prompts, and plain padded rows.

Both take rows in the caller's order: those kept, then those added. A group is one prompt and the rows that continue it.

Shape suffixes: B live rows, P prompts with live rows, L prompt columns (padded), W columns of the rows' own keys,
H query heads, K key heads, R = H / K, D head width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truecourse.data.sequences import Batch
from truecourse.model import attention
from truecourse.model.attention import Rules
from truecourse.model.logprobs import Head, trunk

PREFILL_TOKENS = 16384
"""Most prompt tokens of one prefill pass; one longer prompt goes alone."""
FIRST_COLUMNS = 64
"""Columns of own keys at first; they double until they hold the longest completion."""


@dataclass
class Group:
    """A prompt, and how many new rows continue it."""

    prompt: Sequence[int]
    rows: int


class Decoder(Protocol):
    takes_more: bool
    """Whether rows can be added while others are under way."""

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these (places in the current order, ascending)."""
        ...

    def add(self, groups: Sequence[Group]) -> Tensor:
        """Append rows; returns the logits `[new rows, V]` of their first tokens."""
        ...

    def freeze(self, rows: list[int]) -> None:
        """These rows are finished: their results no longer matter, and their positions stay inside the context."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Feed every row its newest token; returns the logits `[B, V]` of the next."""
        ...


# -- rows that share their prompts -------------------------------------------------------------------------------------


class SharedPrompts:
    """One flat row `[1, B]` of newest tokens through the attention seam; this object is the cache and the mask.

    Every prompt is run once and its keys are stored once for its group. Rows live in cohorts of similar prompt length.
    """

    takes_more = True

    def __init__(self, model: nn.Module, head: Head, prompt_lengths: Sequence[int], max_tokens: int):
        self.model, self.head, self.device = model, head, head.weight_VD.device
        self.cohorts = [_Cohort(self.device, floor, max_tokens - 1) for floor in _floors(prompt_lengths)]
        self.cohort_of: list[_Cohort] = []
        self.positions_B = self.moving_B = torch.zeros(0, dtype=torch.long, device=self.device)
        self.seats: list[tuple[_Cohort, int]] = []
        """Cohort of each row, and its place among that cohort's rows."""
        self._live: list[tuple[_Cohort, slice]] = []
        self._order: tuple[Tensor, Tensor] | None = None
        """Caller's order to cohort order and back, where they differ."""

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.positions_B, self.moving_B = self.positions_B[index], self.moving_B[index]
        kept = set(rows)
        for i, cohort in enumerate(self.cohorts):
            places = [place for place, home in enumerate(self.cohort_of) if home is cohort]
            staying = [j for j, place in enumerate(places) if place in kept]
            if not staying:
                self.cohorts[i] = _Cohort(self.device, cohort.floor, cohort.most)
            elif len(staying) < len(places):
                cohort.keep(staying)
        self.cohort_of = [self.cohort_of[i] for i in rows]
        self._arrange()

    def add(self, groups: Sequence[Group]) -> Tensor:
        logits: list[Tensor] = []
        for chunk in _chunks(groups):
            layout = _Prefill(Batch([g.prompt for g in chunk], [], []), self.device)
            hidden_SD = trunk(self.model, layout.tokens, layout.positions, layout)
            logits.append(self.head.logits(hidden_SD.index_select(0, layout.last_P)))
            homes = [next(c for c in self.cohorts if len(g.prompt) >= c.floor) for g in chunk]
            for cohort in dict.fromkeys(homes):
                members = [i for i, home in enumerate(homes) if home is cohort]
                cohort.add(layout, members, [chunk[i].rows for i in members])
            self.cohort_of += [home for g, home in zip(chunk, homes) for _ in range(g.rows)]
        counts = torch.tensor([g.rows for g in groups], device=self.device)
        lengths = torch.tensor([len(g.prompt) for g in groups], device=self.device)
        self.positions_B = torch.cat([self.positions_B, (lengths - 1).repeat_interleave(counts)])
        self.moving_B = torch.cat([self.moving_B, self.moving_B.new_ones(sum(g.rows for g in groups))])
        self._arrange()
        return torch.cat(logits).repeat_interleave(counts, 0)

    def freeze(self, rows: list[int]) -> None:
        self.moving_B[torch.tensor(rows, device=self.device)] = 0
        for row in rows:
            cohort, seat = self.seats[row]
            cohort.ended[seat] = True

    def step(self, tokens_B: Tensor) -> Tensor:
        self.positions_B = self.positions_B + self.moving_B
        positions_B = self.positions_B
        if self._order is not None:
            tokens_B, positions_B = tokens_B[self._order[0]], positions_B[self._order[0]]
        for cohort, here in self._live:
            cohort.advance(positions_B[here])
        hidden_BD = trunk(self.model, tokens_B[None], positions_B[None], self)
        if self._order is not None:
            hidden_BD = hidden_BD[self._order[1]]
        return self.head.logits(hidden_BD)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        q_BHD, k_BKD, v_BKD = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        out = [c.attend(layer, q_BHD[here], k_BKD[here], v_BKD[here], rules) for c, here in self._live]
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def _arrange(self) -> None:
        self._live, self.seats, at = [], [], 0
        taken = dict.fromkeys(self.cohorts, 0)
        for cohort in self.cohort_of:
            self.seats.append((cohort, taken[cohort]))
            taken[cohort] += 1
        first = {}
        for cohort in self.cohorts:
            first[cohort] = at
            if cohort.rows:
                self._live.append((cohort, slice(at, at + cohort.rows)))
                at += cohort.rows
        back = [first[cohort] + seat for cohort, seat in self.seats]
        self._order = None
        if len(self._live) > 1:
            there = torch.tensor(back, device=self.device)
            self._order = there.argsort(), there


class _Prefill(attention.Packed):
    """Prompts alone; keeps every layer's keys and values `[K, S, D]`."""

    def __init__(self, batch: Batch, device: Any):
        super().__init__(batch, device)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths = torch.tensor([len(p) for p in batch.prompts])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.last_P = (self.starts + self.lengths - 1).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        self.kept[layer] = key[0], value[0]
        return super().attend(layer, query, key, value, rules)


def _floors(lengths: Sequence[int]) -> list[int]:
    """Shortest prompt of each cohort, longest cohort first: lengths within a cohort differ by at most about twofold."""
    floors: list[int] = []
    top = 0
    for n in sorted(set(lengths), reverse=True):
        if not floors or 2 * n + 32 < top:
            floors.append(n)
            top = n
        floors[-1] = n
    return floors


def _chunks(groups: Sequence[Group]) -> list[list[Group]]:
    chunks: list[list[Group]] = []
    used = 0
    for group in groups:
        if not chunks or used + len(group.prompt) > PREFILL_TOKENS:
            chunks.append([])
            used = 0
        chunks[-1].append(group)
        used += len(group.prompt)
    return chunks


@dataclass(eq=False)
class _Cohort:
    """Rows whose prompts have similar lengths.

    Prompt keys are `[K, P, L, D]`, padded on the right. Own keys are `[K, B, W, D]` with one column for each step: all
    rows write the same column, so a key's distance to the newest token is the same for every row (a sliding window is
    a slice), and only a row that joined later must be kept from seeing the columns before its `start`.
    """

    device: torch.device
    floor: int
    """Shortest prompt that belongs here."""
    most: int
    """Columns that the longest completion needs: its last token is never fed."""
    lengths: list[int] = field(default_factory=list)
    """Of the P prompts."""
    owner: list[int] = field(default_factory=list)
    """Prompt of each row, ascending."""
    start: list[int] = field(default_factory=list)
    """First own column of each row."""
    ended: list[bool] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    """Where in `own` the row's keys are until the next `advance` puts them in order; −1 for a row that has none yet."""
    width: int = 0
    """Columns in use, the newest token's included once `advance` was called."""
    columns: int = field(default_factory=lambda: FIRST_COLUMNS)
    prompt: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.owner)

    # -- who is in it

    def keep(self, rows: list[int]) -> None:
        for name in ("owner", "start", "ended", "source"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in rows])
        prompts = sorted(set(self.owner))
        if len(prompts) < len(self.lengths):
            index = torch.tensor(prompts, device=self.device)
            self.lengths = [self.lengths[p] for p in prompts]
            longest = max(self.lengths)
            for layer, pair in self.prompt.items():
                self.prompt[layer] = _map(pair, lambda x: x.index_select(1, index)[:, :, :longest])
            place = {p: i for i, p in enumerate(prompts)}
            self.owner = [place[o] for o in self.owner]
        self.stale = True

    def add(self, prefill: _Prefill, members: list[int], rows: list[int]) -> None:
        """Some prompts of a prefill, with so many new rows each."""
        lengths = prefill.lengths[members]
        longest = max([*self.lengths, int(lengths.max())])
        places = prefill.starts[members][:, None] + torch.arange(longest).clamp(max=lengths[:, None] - 1)
        flat = places.reshape(-1).to(self.device)
        for layer, pair in prefill.kept.items():
            new = _map(pair, lambda x: x.index_select(1, flat).view(x.shape[0], len(members), longest, -1))
            if layer in self.prompt:
                old = _map(self.prompt[layer], lambda x: F.pad(x, (0, 0, 0, longest - x.shape[2])))
                new = torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)
            self.prompt[layer] = new
        first = len(self.lengths)
        self.lengths += lengths.tolist()
        joined = sum(rows)
        self.owner += [first + i for i, n in enumerate(rows) for _ in range(n)]
        self.start += [self.width] * joined
        self.ended += [False] * joined
        self.source += [-1] * joined
        self.stale = True

    # -- decoding

    def advance(self, positions_B: Tensor) -> None:
        """Open the column of the newest tokens, which stand at these positions."""
        if self.stale or self.width == self.columns:
            self._rebuild()
            self._arrange()
        self.width += 1
        self.positions_B = positions_B
        self._windows: dict[int, Tensor | None] = {}

    def _rebuild(self) -> None:
        """Put own keys in the rows' order; drop the columns that no unfinished row needs, and make room for more."""
        low = min((s for s, ended in zip(self.start, self.ended) if not ended), default=self.width)
        self.start = [max(0, s - low) for s in self.start]
        used, self.width = slice(low, self.width), self.width - low
        while self.columns - self.width <= self.columns // 5:
            self.columns *= 2
        slack = self.most // 4 if max(self.start) else 0  # lest rows that come and go move all columns at every step
        self.columns = max(self.width + 1, min(self.columns, self.most + slack))
        kept = [source for source in self.source if source >= 0]  # those that joined stand behind them
        index = torch.tensor(kept, dtype=torch.long, device=self.device)

        def moved(x: Tensor) -> Tensor:
            new = x.new_zeros(x.shape[0], self.rows, self.columns, x.shape[3])
            new[:, : len(kept), : self.width] = x[:, :, used].index_select(1, index)
            return new

        for layer, pair in self.own.items():
            self.own[layer] = _map(pair, moved)
        self.source = list(range(self.rows))
        self.stale = False

    def _arrange(self) -> None:
        """How rows map to the rectangle [P, G] that meets the prompts' keys, and what each must not see."""
        device = self.device
        counts = [0] * len(self.lengths)
        seat = []
        for o in self.owner:
            seat.append((o, counts[o]))
            counts[o] += 1
        self.group = max(counts)
        self.rectangle: tuple[Tensor, Tensor] | None = None
        """Rows to rectangle and back, where prompts have unequal numbers of rows."""
        if min(counts) < self.group:
            spots = [o * self.group + i for o, i in seat]
            filled = [0] * (self.group * len(counts))
            for row, spot in enumerate(spots):
                filled[spot] = row
            self.rectangle = torch.tensor(filled, device=device), torch.tensor(spots, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        steps = torch.arange(int(max(self.lengths)), device=device)
        self.here_PL = steps < lengths[:, None]
        self.hidden_P1L = None if min(self.lengths) == len(steps) else _hide(self.here_PL)[:, None]
        self.here_BL = self.here_PL[torch.tensor(self.owner, device=device)]
        self.hidden_B1W = None
        if max(self.start):
            starts = torch.tensor(self.start, device=device)
            self.hidden_B1W = _hide(torch.arange(self.columns, device=device) >= starts[:, None])[:, None]

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor, rules: Rules) -> Tensor:
        """`[B, H, D]` over the rows' prompts and what they have sampled so far; one softmax over both."""
        rows, heads, dim = q_BHD.shape
        K, n_prompts, width = k_BKD.shape[1], len(self.lengths), self.width
        R, rect = heads // K, self.rectangle
        if layer not in self.own:
            self.own[layer] = (
                k_BKD.new_zeros(K, rows, self.columns, dim),
                v_BKD.new_zeros(K, rows, self.columns, v_BKD.shape[2]),
            )
        own_k, own_v = self.own[layer]
        own_k[:, :, width - 1] = k_BKD.transpose(0, 1)
        own_v[:, :, width - 1] = v_BKD.transpose(0, 1)
        low = 0 if rules.window is None else max(0, width - rules.window)
        q = (q_BHD * (dim**-0.5 if rules.scaling is None else rules.scaling)).view(rows, K, R, dim).transpose(0, 1)

        own = torch.bmm(q.reshape(K * rows, R, dim), own_k[:, :, low:width].flatten(0, 1).transpose(1, 2))
        if rules.softcap is not None:
            own = torch.tanh(own / rules.softcap) * rules.softcap
        if self.hidden_B1W is not None:
            own.view(K, rows, R, -1).add_(self.hidden_B1W[:, :, low:width])

        if rules.window is not None and width - max(self.start) >= rules.window:  # every prompt is out of sight
            p = own.softmax(-1, dtype=torch.float32).to(own_v.dtype)
            out = torch.bmm(p, own_v[:, :, low:width].flatten(0, 1))
            return out.view(K, rows, -1).transpose(0, 1).reshape(rows, heads, -1)

        prompt_k, prompt_v = (x.flatten(0, 1) for x in self.prompt[layer])
        L = prompt_k.shape[1]
        q_rect = q if rect is None else q.index_select(1, rect[0])
        seen = torch.bmm(q_rect.reshape(K * n_prompts, self.group * R, dim), prompt_k.transpose(1, 2))
        if rules.softcap is not None:
            seen = torch.tanh(seen / rules.softcap) * rules.softcap
        out_of_window = None if rules.window is None else self._out_of_window(rules.window)
        if out_of_window is None and self.hidden_P1L is not None:
            seen.view(K, n_prompts, self.group * R, L).add_(self.hidden_P1L)
        if rect is not None:
            seen = seen.view(K, -1, R, L).index_select(1, rect[1])
        seen = seen.view(K * rows, R, L)
        if out_of_window is not None:
            seen.view(K, rows, R, L).add_(out_of_window)

        p = torch.cat([seen, own], -1).softmax(-1, dtype=torch.float32).to(own_v.dtype)
        out = torch.bmm(p[..., L:], own_v[:, :, low:width].flatten(0, 1))
        p = p[..., :L]
        if rect is not None:
            p = p.reshape(K, rows, R, L).index_select(1, rect[0])
        more = torch.bmm(p.reshape(K * n_prompts, self.group * R, L), prompt_v)
        if rect is not None:
            more = more.view(K, -1, R, more.shape[-1]).index_select(1, rect[1])
        out = out.view(K, rows, -1).add_(more.view(K, rows, -1))
        return out.transpose(0, 1).reshape(rows, heads, -1)

    def _out_of_window(self, window: int) -> Tensor | None:
        """−inf `[B, 1, L]` on prompt tokens `window` or more back; None while every row sees all of its prompt."""
        if window not in self._windows:
            oldest = self.width - 1 - min(self.start)
            hidden = None
            if max(self.lengths) + oldest >= window:
                back = self.positions_B[:, None] - torch.arange(self.here_BL.shape[1], device=self.positions_B.device)
                hidden = _hide(self.here_BL & (back < window))[:, None]
            self._windows[window] = hidden
        return self._windows[window]


def _hide(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def _map(pair: tuple[Tensor, Tensor], change: Any) -> tuple[Tensor, Tensor]:
    return change(pair[0]), change(pair[1])


# -- plain padded rows -------------------------------------------------------------------------------------------------


class PaddedRows:
    """For models that do not go through transformers' attention registry: left-padded rows, transformers' own cache.

    A prompt is run once for each of its rows, and rows are added only when all others have left.
    """

    takes_more = False

    cache: Any
    mask_BS: Tensor
    positions_B: Tensor
    moving_B: Tensor

    def __init__(self, model: Any, head: Head):
        self.base, self.config, self.head, self.device = model.base_model, model.config, head, head.weight_VD.device
        self.with_positions = "position_ids" in inspect.signature(self.base.forward).parameters

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        if rows:
            self.cache.batch_select_indices(index)
            self.mask_BS = self.mask_BS[index]
            self.positions_B, self.moving_B = self.positions_B[index], self.moving_B[index]

    def add(self, groups: Sequence[Group]) -> Tensor:
        from transformers import DynamicCache

        prompts = [g.prompt for g in groups for _ in range(g.rows)]
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.cache = DynamicCache(config=self.config)
        positions = (self.mask_BS.cumsum(-1) - 1).clamp(min=0)
        self.positions_B, self.moving_B = positions[:, -1], torch.ones_like(positions[:, -1])
        return self._forward(tokens, positions)

    def freeze(self, rows: list[int]) -> None:
        self.moving_B[torch.tensor(rows, device=self.device)] = 0

    def step(self, tokens_B: Tensor) -> Tensor:
        self.mask_BS = F.pad(self.mask_BS, (0, 1), value=1)
        self.positions_B = self.positions_B + self.moving_B
        return self._forward(tokens_B[:, None], self.positions_B[:, None])

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        extra = {"position_ids": positions} if self.with_positions else {}
        out = self.base(
            input_ids=tokens, attention_mask=self.mask_BS, past_key_values=self.cache, use_cache=True, **extra
        )  # fmt: skip
        return self.head.logits(out.last_hidden_state[:, -1])
