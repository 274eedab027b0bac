"""GPTQ (arXiv 2210.17323): levels chosen one input after another, each error made good by the inputs that are still to come.

O outputs, I inputs, G groups of an output's inputs, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.nn import int4, int8
from tunesmith.nn.scheme import Scheme

_LEVELS: dict[str, Any] = {
    "int4": (int4.group_scales, int4.LOWEST, int4.HIGHEST),
    "int8": (int8.group_scales, int8.LOWEST, int8.HIGHEST),
}
"""{levels: (what chooses their scales, lowest, highest)}."""

_BLOCK = 128
"""Inputs whose errors are made good among themselves first, and beyond them in one product."""


class Hessian:
    """Sum of x xᵀ over the inputs x (I,) that a layer is given: half the second derivative of its squared error by a row of weights."""

    def __init__(self, inputs: int, device: torch.device):
        self.sum = torch.zeros(inputs, inputs, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Inputs (…, I)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(rows.t(), rows)
        self.count += len(rows)


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Levels (O, I) and scales (O, G) of a weight (O, I) for the inputs of whose products `hessian` (I, I) is the sum.

    The scales are those of rounding to nearest, so that the order of inputs is free: those with the largest products go first
    (the paper's implementation calls the two static groups and act-order). damping: part of the mean of the diagonal that is added
    to it. Errors are kept in float32. Raises ValueError for levels that are not whole numbers.
    """
    if scheme.kind.levels not in _LEVELS:
        raise ValueError(f"GPTQ chooses whole numbers, and {scheme} has none")
    choose_scales, *limits = _LEVELS[scheme.kind.levels]
    group_size = scheme.group_size or weight.shape[1]
    scales = choose_scales(weight, group_size)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    steps = scales.float().repeat_interleave(group_size, 1)[:, order]
    levels = _choose(weight.float()[:, order], steps, _inverse_root(hessian[order][:, order], damping), *limits)
    return levels[:, order.argsort()].to(torch.int8), scales


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse: its row i says how an error at input i is made good by those behind it."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal += max(damping * diagonal.mean().item(), torch.finfo(torch.float32).tiny)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
        diagonal += 0.1 * diagonal.mean()  # inputs that hang together to the last digit
    raise ValueError("the inputs of a layer are not finite, or all the same")


def _choose(weight: Tensor, steps: Tensor, root: Tensor, low: int, high: int) -> Tensor:
    """Levels (O, I) from low to high of `weight`, which is used up, in its order of inputs."""
    levels = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            step = steps[:, column]
            levels[:, column] = (weight[:, column] / step).round_().clamp_(low, high)
            error = (weight[:, column] - levels[:, column] * step) / root[column, column]
            weight[:, column:end] -= error[:, None] * root[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ root[start:end, end:]
    return levels
