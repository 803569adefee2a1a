"""The local engine: samples from the very model that is being trained."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from truecourse.data.sequences import Completion, Prompt, StopReason
from truecourse.errors import UserError
from truecourse.model.logprobs import head_of
from truecourse.recipe import Sampling
from truecourse.rollout.decoding import Decoder, Group, PaddedRows, SharedPrompts
from truecourse.rollout.engine import Stats
from truecourse.rollout.sampler import Decode, StopStrings, draw
from truecourse.rollout.streams import uniforms

LIVE_SHARE = 0.85
"""Finished rows are dropped, and waiting prompts take their place, when fewer than this share of rows are live."""


@dataclass(eq=False)
class _Row:
    """One completion under way."""

    prompt: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    tail: int = 0
    stop: StopReason | None = None
    cut: int | None = None


class LocalEngine:
    """Samples from `model` itself, in its own process: no copy of the weights, log-probs that are the trainer's.

    `end_ids` end a completion (and are part of it); `decode` turns ids into text without special tokens. At most
    `max_rows` completions are under way at a time. `packed=False` is for models off the attention seam.
    `on_progress(tokens so far, live rows)` is called after every step.
    """

    exact = True

    def __init__(
        self,
        model: nn.Module,
        end_ids: Collection[int],
        decode: Decode,
        *,
        max_rows: int = 256,
        packed: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        assert max_rows >= 1
        self.model, self.end_ids, self.decode = model, frozenset(end_ids), decode
        self.max_rows, self.packed, self.on_progress = max_rows, packed, on_progress
        self.version = 0
        self.stats = Stats()
        """Of the last `generate`."""

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are already here; completions carry this version from now on."""
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: tuple[int, ...]
    ) -> list[list[Completion]]:
        """`n` completions of each prompt: see `Engine`. A greedy group is sampled once, since all of it is the same."""
        assert n >= 1
        self._check_context(prompts, sampling)
        if not prompts:
            self.stats = Stats()
            return []
        samples = 1 if sampling.temperature == 0 else n
        with _evaluating(self.model), torch.inference_mode():
            done = _Generation(self, prompts, samples, sampling, seed).run()
        return [[done[p, s % samples] for s in range(n)] for p in range(len(prompts))]

    def _check_context(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        config: Any = self.model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        for prompt in prompts:
            length = len(prompt.tokens)
            assert length, f"prompt of row {prompt.index} has no tokens"
            if context and length + sampling.max_tokens > context:
                room = context - length
                fix = (
                    f"set max_tokens to at most {room}, or shorten the prompt"
                    if room > 0
                    else "shorten or drop the prompt"
                )
                raise UserError(
                    f"row {prompt.index}: its prompt of {length} tokens and max_tokens = {sampling.max_tokens} "
                    f"do not fit the model's context of {context} tokens; {fix}"
                )


class _Generation:
    """One call of `generate`. B rows are in the batch, in the order of `rows`."""

    def __init__(
        self, engine: LocalEngine, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: tuple[int, ...]
    ):
        self.engine, self.prompts, self.sampling, self.seed = engine, prompts, sampling, seed
        head = head_of(engine.model)
        head = replace(head, weight_VD=head.weight_VD.float())  # once, not at every step
        self.decoder: Decoder
        if engine.packed:
            lengths = [len(p.tokens) for p in prompts]
            self.decoder = SharedPrompts(engine.model, head, lengths, sampling.max_tokens)
        else:
            self.decoder = PaddedRows(engine.model, head)
        self.stops = StopStrings(sampling.stop, engine.decode) if sampling.stop else None
        self.done: dict[tuple[int, int], Completion] = {}
        # a group wider than the batch is taken in pieces
        self.waiting = deque(
            [_Row(p, s) for s in range(first, min(first + engine.max_rows, n))]
            for p in range(len(prompts))
            for first in range(0, n, engine.max_rows)
        )
        self.rows: list[_Row] = []
        self.live = 0
        device = head.weight_VD.device
        self.tokens_B = torch.zeros(0, dtype=torch.long, device=device)
        self.age_B1 = torch.zeros(0, 1, dtype=torch.long, device=device)
        """How many tokens each row has sampled before the one being drawn."""
        self.moving_B1 = torch.zeros_like(self.age_B1)
        """1 for a live row, 0 for one that has ended: what its age grows by."""
        self.uniforms_BT = torch.zeros(0, sampling.max_tokens if sampling.temperature > 0 else 0, device=device)
        self.logps: list[Tensor] = []
        """`[B]` of each step since the rows last changed; fetched from the device only then."""
        self.prompt_tokens = self.tokens = self.steps = self.rows_run = self.rows_live = 0

    def run(self) -> dict[tuple[int, int], Completion]:
        """{(prompt, sample): completion}, and the engine's stats."""
        seconds = {True: 0.0, False: 0.0}
        while self.waiting or self.live:
            began = time.perf_counter()
            changing = self.live < LIVE_SHARE * self._capacity()
            if changing:
                self._change_rows()
            else:
                self._step()
            seconds[changing] += time.perf_counter() - began
            if self.engine.on_progress:
                self.engine.on_progress(self.tokens, self.live)
        self._collect()
        occupancy = self.rows_live / self.rows_run if self.rows_run else 0.0
        self.engine.stats = Stats(self.prompt_tokens, self.tokens, self.steps, seconds[True], seconds[False], occupancy)
        return self.done

    def _step(self) -> None:
        self.steps += 1
        self.rows_run += len(self.rows)
        self.rows_live += self.live
        logits_BV = self.decoder.step(self.tokens_B)
        self.age_B1 = self.age_B1 + self.moving_B1
        self.tokens_B, logps_B = self._draw(logits_BV, self.uniforms_BT, self.age_B1)
        self.logps.append(logps_B)
        self._extend(0, self.tokens_B.tolist())  # the step's one wait for the device

    def _draw(self, logits_BV: Tensor, uniforms_BT: Tensor, age_B1: Tensor) -> tuple[Tensor, Tensor]:
        greedy = self.sampling.temperature == 0
        return draw(logits_BV, None if greedy else uniforms_BT.gather(1, age_B1)[:, 0], self.sampling)

    def _extend(self, first: int, tokens: list[int]) -> None:
        """Append its new token to each row from `first` on, and see which rows end with it."""
        ended = []
        for i, (row, token) in enumerate(zip(self.rows[first:], tokens), first):
            if row.stop:
                continue
            row.tokens.append(token)
            self.tokens += 1
            if token in self.engine.end_ids:
                row.stop = "eos"
            elif self.stops and self._at_stop_string(row):
                row.stop = "stop"
            elif len(row.tokens) == self.sampling.max_tokens:
                row.stop = "length"
            else:
                continue
            ended.append(i)
        if ended:
            self.live -= len(ended)
            self.decoder.freeze(ended)
            self.moving_B1[torch.tensor(ended, device=self.moving_B1.device)] = 0

    def _at_stop_string(self, row: _Row) -> bool:
        assert self.stops
        row.cut, row.tail = self.stops.cut(row.tokens, row.tail)
        return row.cut is not None

    # -- who is in the batch

    def _room(self) -> int:
        return self.engine.max_rows - self.live if self.decoder.takes_more or not self.live else 0

    def _capacity(self) -> int:
        """Rows that there could be: what is waiting counts once the next group fits."""
        return self.engine.max_rows if self.waiting and len(self.waiting[0]) <= self._room() else len(self.rows)

    def _change_rows(self) -> None:
        """Finished rows leave; waiting prompts take their place."""
        self._collect()
        kept = [i for i, row in enumerate(self.rows) if not row.stop]
        if len(kept) < len(self.rows):
            self.decoder.keep(kept)
            self.rows = [self.rows[i] for i in kept]
            index = torch.tensor(kept, dtype=torch.long, device=self.tokens_B.device)
            self.tokens_B, self.uniforms_BT = self.tokens_B[index], self.uniforms_BT[index]
            self.age_B1, self.moving_B1 = self.age_B1[index], self.moving_B1[index]
        joining, room = [], self._room()
        while self.waiting and len(self.waiting[0]) <= room:
            joining.append(self.waiting.popleft())
            room -= len(joining[-1])
        if joining:
            self._begin(joining)

    def _begin(self, joining: list[list[_Row]]) -> None:
        """Run the prompts of these groups and draw every row's first token."""
        groups = [Group(self.prompts[rows[0].prompt].tokens, len(rows)) for rows in joining]
        logits_NV = self.decoder.add(groups)
        self.prompt_tokens += sum(len(g.prompt) * (1 if self.engine.packed else g.rows) for g in groups)
        first, new = len(self.rows), [row for rows in joining for row in rows]
        count = self.sampling.max_tokens if self.sampling.temperature > 0 else 0
        streams = [uniforms(self.seed, self.prompts[row.prompt].index, row.sample, count) for row in new]
        uniforms_NT = torch.from_numpy(np.stack(streams)).to(logits_NV.device)
        age_N1 = torch.zeros(len(new), 1, dtype=torch.long, device=logits_NV.device)
        tokens_N, logps_N = self._draw(logits_NV, uniforms_NT, age_N1)
        for row, logp in zip(new, logps_N.tolist()):
            row.logps.append(logp)
        self.rows += new
        self.live += len(new)
        self.tokens_B = torch.cat([self.tokens_B, tokens_N])
        self.uniforms_BT = torch.cat([self.uniforms_BT, uniforms_NT])
        self.age_B1 = torch.cat([self.age_B1, age_N1])
        self.moving_B1 = torch.cat([self.moving_B1, torch.ones_like(age_N1)])
        self._extend(first, tokens_N.tolist())

    def _collect(self) -> None:
        """Fetch the log-probs since the rows last changed, and complete the rows that have ended."""
        if self.logps:
            for row, logps in zip(self.rows, torch.stack(self.logps, 1).tolist()):
                row.logps += logps[: len(row.tokens) - len(row.logps)]
            self.logps.clear()
        for row in self.rows:
            if row.stop:
                text = self.engine.decode(row.tokens[:-1] if row.stop == "eos" else row.tokens)
                self.done[row.prompt, row.sample] = Completion(
                    tuple(row.tokens), tuple(row.logps), row.stop, self.engine.version, text[: row.cut]
                )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (which also turns gradient checkpointing off), and every module back as it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
