"""AdamW whose running averages are kept in a number type of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamWithStateDtype(torch.optim.AdamW):
    """torch's AdamW, computed in float32 for one parameter at a time; its averages are rounded to `state_dtype` between steps.

    torch's own keeps them in the parameter's number type: in bfloat16 under bfloat16 weights, in float32 under float32 ones.
    """

    def __init__(self, *arguments: Any, state_dtype: torch.dtype, **options: Any):
        super().__init__(*arguments, **options)
        self.state_dtype = state_dtype
        self._buffers: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        largest = max(parameter.numel() for group in self.param_groups for parameter in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, largest)
        self._buffers.clear()

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], largest: int) -> None:
        state = self.state[parameter] or self._fresh_state(parameter, group)
        kept = (parameter, state["exp_avg"], state["exp_avg_sq"], gradient)
        weights, average, squares, change = (self._as_float32(t, place, largest) for place, t in enumerate(kept))
        beta1, beta2 = group["betas"]
        adamw(
            [weights], [change], [average], [squares], [], [state["step"]], foreach=False, fused=group["fused"],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
        for tensor, new in zip(kept, (weights, average, squares)):
            if new is not tensor:  # of float32 it is the tensor itself
                tensor.copy_(new)

    def _as_float32(self, tensor: Tensor, place: int, largest: int) -> Tensor:
        """The tensor itself, or a copy in a buffer that the next parameter takes again: fresh memory costs a CPU more than the update."""
        if tensor.dtype == torch.float32:
            return tensor
        while len(self._buffers) <= place:
            self._buffers.append(torch.empty(0, device=tensor.device))
        if not self._buffers[place].numel():
            self._buffers[place] = torch.empty(largest, dtype=torch.float32, device=tensor.device)
        return self._buffers[place][: tensor.numel()].view(tensor.shape).copy_(tensor)

    def _fresh_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        # torch counts steps on the device for the fused kernel, on the host for the others.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=self.state_dtype)
        return state
