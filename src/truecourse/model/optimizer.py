"""AdamW with float32 master weights, gradient clipping, and a state that safetensors can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Adam:
    """AdamW (Loshchilov & Hutter 2019) over a model's trainable parameters, by name.

    Parameters in less than float32 are trained through a float32 master copy, so that small updates are not lost.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)):
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert self.live, "nothing to train"
        self.master = {
            name: p if p.dtype == torch.float32 else p.detach().float().clone().requires_grad_()
            for name, p in self.live.items()
        }
        self.adam = torch.optim.AdamW(self.master.values(), lr=0.0, weight_decay=weight_decay, betas=betas, fused=True)

    def step(self, lr: float, max_grad_norm: float = 0.0) -> float:
        """One update from the accumulated gradients, which it clears. Returns their global norm before clipping.

        A norm that is not finite leaves the weights as they are.
        """
        for name, p in self.live.items():
            if p.grad is not None and self.master[name] is not p:
                self.master[name].grad, p.grad = p.grad.float(), None
        grads = [p.grad for p in self.master.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if bool(torch.isfinite(norm)):
            if max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(list(self.master.values()), max_grad_norm, norm)
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            self._publish()
        self.adam.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, p in self.live.items():
            if self.master[name] is not p:
                p.copy_(self.master[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, besides the live weights."""
        tensors = {}
        for name, p in self.master.items():
            for key, value in self.adam.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = value
            if p is not self.live[name]:
                tensors[f"master.{name}"] = p.detach()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, onto the same model."""
        with torch.no_grad():
            for name, p in self.master.items():
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"adam.step.{name}" in tensors:
                    self.adam.state[p] = {key: tensors[f"adam.{key}.{name}"].clone().to(p.device) for key in keys}
                if p is not self.live[name]:
                    p.copy_(tensors[f"master.{name}"])
        self._publish()
