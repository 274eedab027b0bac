"""Sums and gathers over the ranks of a group that autograd understands. In a group of one each is the identity.

T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

# torch 2.13 renamed both.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_sum_and_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Equal parts of all ranks along `dim`, in the order of ranks."""
    x = x.contiguous()
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    all_gather(parts, x, group=group)
    return parts if dim == 0 else torch.cat(parts.chunk(group.size()), dim)


def _reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part, along `dim`, of the sum over all ranks."""
    parts = torch.cat(x.chunk(group.size(), dim))
    own = x.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    _sum_and_scatter(own, parts, group=group)
    return own


def _own(x: Tensor, dim: int, group: Group) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class _ReduceBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, sums: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.sums = dim, group, sums
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        back = _reduce_scatter if ctx.sums else _own
        return back(gradient, ctx.dim, ctx.group), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gather(gradient, ctx.dim, ctx.group), None, None


def copied(x: Tensor, group: Group) -> Tensor:
    """x itself, where each rank then computes a different part of what depends on it: gradients are summed."""
    return x if group.size() == 1 else _Copy.apply(x, group)  # type: ignore[return-value]


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of what each rank has, where all ranks then compute the same: the gradient passes as it is."""
    return x if group.size() == 1 else _Reduce.apply(x, group)  # type: ignore[return-value]


def shared_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of what each rank has, where each rank then computes something different: gradients are summed, too."""
    return x if group.size() == 1 else _ReduceBoth.apply(x, group)  # type: ignore[return-value]


def largest(x: Tensor, group: Group) -> Tensor:
    """The largest of what the ranks have at each place; not to be differentiated."""
    most = x.contiguous().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return most


def gathered(x: Tensor, dim: int, group: Group, sums: bool) -> Tensor:
    """All ranks' parts along `dim`. sums: each rank then computes something different, so gradients are summed; else each takes its own part."""
    return x if group.size() == 1 else _Gather.apply(x, dim, group, sums)  # type: ignore[return-value]


def scattered_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of the sum of what each rank has."""
    return x if group.size() == 1 else _Scatter.apply(x, dim, group)  # type: ignore[return-value]
