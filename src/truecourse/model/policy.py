"""The policy: log-probs, backward, step, weights; and its reference."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from truecourse.data.sequences import Batch
from truecourse.model.loading import Loaded
from truecourse.model.logprobs import Scores, head_of, score
from truecourse.model.optimizer import Adam

ReferenceKind = Literal["none", "copy", "adapter_off", "offload"]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch that one forward takes."""

    batch: Batch
    rows: slice
    """Its completions among the N."""
    tokens: slice
    """Its completion tokens among the T."""


class Policy:
    """A causal LM being trained, and the frozen one that it is compared with.

    `logprobs`, `backward`, `step`, `weights` are all that a method needs of it; `reference` scores under the reference.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        reference: ReferenceKind = "none",
        micro_tokens: int = 8192,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        gradient_checkpointing: bool = False,
    ):
        self.model, self.tokenizer, self.packed = loaded.model, loaded.tokenizer, loaded.packed
        self.head = head_of(self.model)
        self.micro_tokens, self.max_grad_norm = micro_tokens, max_grad_norm
        self.optimizer = Adam(self.model, weight_decay=weight_decay)
        self.version = 0
        """How many optimiser steps the weights have seen."""
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if hasattr(self.model, "peft"):
                self.model.enable_input_require_grads()
        self._checkpointing = gradient_checkpointing
        self._reference_kind = reference
        self._reference: Any = None
        if reference in ("copy", "offload"):
            self._reference = self._frozen_copy()

    @property
    def device(self) -> torch.device:
        return self.head.weight_VD.device

    # -- the four verbs

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> Scores:
        """Log-prob and entropy of every completion token, with gradients unless inside `torch.no_grad`."""
        # transformers recomputes activations only in training mode; dropout is 0 but for LoRA's own
        self.model.train(torch.is_grad_enabled())
        return score(self.model, self.head, batch, temperature, packed=self.packed)

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to those accumulated since the last step."""
        loss.backward()

    def step(self, lr: float) -> float:
        """One AdamW update at this learning rate; returns the gradients' global norm before clipping."""
        norm = self.optimizer.step(lr, self.max_grad_norm)
        self.version += 1
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and live tensor of every weight, as another engine would load them."""
        yield from self.model.state_dict().items()

    # -- cutting a batch

    def micro_batches(self, batch: Batch, unit: int = 1) -> list[MicroBatch]:
        """`batch` cut, in order, to at most `micro_tokens` tokens each (prompts counted once); one sequence that is
        longer by itself goes alone. A group that fits whole is not cut, so that its prompt is run once.

        unit: completions that a loss couples, such as the 2 of a pair, and that therefore stay together.
        """
        parts: list[MicroBatch] = []
        first, token, used, last = 0, 0, 0, -1
        lengths = batch.lengths_N
        assert len(lengths) % unit == 0
        group_P = [len(prompt) for prompt in batch.prompts]
        for owner, length in zip(batch.owner, lengths):
            group_P[owner] += length
        for row in range(0, len(lengths), unit):
            owners, here = dict.fromkeys(batch.owner[row : row + unit]), sum(lengths[row : row + unit])
            cost = here + sum(len(batch.prompts[o]) for o in owners if o != last)
            whole = group_P[batch.owner[row]] if batch.owner[row] != last else 0
            need = max(cost, whole) if whole <= self.micro_tokens else cost
            if row > first and used + need > self.micro_tokens:
                parts.append(_cut(batch, first, row, token))
                token += sum(lengths[first:row])
                first, used = row, 0
                cost = here + sum(len(batch.prompts[o]) for o in owners)
            used, last = used + cost, batch.owner[row + unit - 1]
        return [*parts, _cut(batch, first, len(lengths), token)]

    @torch.no_grad()
    def score(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probs `[T]` of the whole batch under the current weights, without gradients."""
        return torch.cat([self.logprobs(part.batch, temperature).logp_T for part in self.micro_batches(batch)])

    # -- the reference

    @torch.no_grad()
    def reference(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probs `[T]` of the whole batch under the reference."""
        assert self._reference_kind != "none", "this policy keeps no reference"
        if self._reference_kind == "adapter_off":
            with self.model.peft.disable_adapter():
                return self.score(batch, temperature)
        if self._reference_kind == "offload":
            self._reference.to(self.device)
        head = head_of(self._reference)
        parts = [
            score(self._reference, head, p.batch, temperature, packed=self.packed).logp_T
            for p in self.micro_batches(batch)
        ]
        if self._reference_kind == "offload":
            self._reference.to("cpu")
        return torch.cat(parts)

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """Reference ← share·policy + (1 − share)·reference (Gorbatovski et al. 2024, TR-DPO, eq. 6 and 7)."""
        assert self._reference is not None, "only a copied reference can move"
        for theirs, ours in zip(self._reference.parameters(), self.model.parameters(), strict=True):
            theirs.lerp_(ours.to(theirs.device, theirs.dtype), share) if share < 1 else theirs.copy_(ours)

    def _frozen_copy(self) -> Any:
        wrapper = self.model.__dict__.pop("peft", None)  # the copy needs the layers, not peft's wrapper around them
        twin = copy.deepcopy(self.model).requires_grad_(False).eval()
        if wrapper is not None:
            object.__setattr__(self.model, "peft", wrapper)
        return twin.to("cpu") if self._reference_kind == "offload" else twin

    # -- on disk

    def save(self, folder: Path) -> None:
        """Plain Hugging Face weights and tokenizer (with LoRA: a plain peft adapter folder)."""
        if hasattr(self.model, "peft"):  # embeddings are frozen: without the flag peft asks the base's hub about them
            self.model.peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        else:
            self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def state(self, *, moving_reference: bool = False) -> dict[str, Tensor]:
        """All tensors that a resumed run needs to be the same run: exact weights, optimiser, a moving reference."""
        tensors = {f"policy.{name}": p.detach() for name, p in self.optimizer.live.items()}
        tensors |= self.optimizer.state()
        if moving_reference:
            tensors |= {f"reference.{name}": p for name, p in self._reference.named_parameters()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], version: int) -> None:
        """The inverse of `state`, onto a policy made from the same start."""
        for name, p in self.optimizer.live.items():
            p.copy_(tensors[f"policy.{name}"])
        self.optimizer.load_state(tensors)
        for name, p in self._reference.named_parameters() if self._reference is not None else ():
            if f"reference.{name}" in tensors:
                p.copy_(tensors[f"reference.{name}"])
        self.version = version

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode without gradient checkpointing."""
        self.model.eval()
        with torch.no_grad():
            yield


def _cut(batch: Batch, first: int, end: int, token: int) -> MicroBatch:
    owners = list(batch.owner[first:end])
    base = owners[0]
    part = Batch(batch.prompts[base : owners[-1] + 1], batch.completions[first:end], [o - base for o in owners])
    return MicroBatch(part, slice(first, end), slice(token, token + sum(part.lengths_N)))
