"""Muon: momentum whose matrices are made orthogonal (https://kellerjordan.github.io/posts/muon/, arXiv 2502.16982), on any layout.

Momentum is elementwise, so each rank keeps that of its part; only the step's direction is brought together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.parallel.whole import Wholes

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """The update of a matrix (A, B) is the orthogonalized momentum, scaled by 0.2 sqrt(max(A, B)) to the size that AdamW's has."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        wholes: Wholes,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
    ):
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._wholes = wholes
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(list(parameters.values()), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        name, state = self._names[id(parameter)], self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        orthogonal = orthogonalized(self._wholes.whole(name, direction))
        scale = 0.2 * math.sqrt(max(self._wholes.shape(name)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(self._wholes.own(name, orthogonal).to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of a matrix (A, B), in bfloat16: five Newton–Schulz iterations of fifth order."""
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)  # singular values of at most 1
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
