"""Gradients over the mesh: what ranks must still add up after the backward pass, and the norm of all together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.configs.layout import AXES
from tunesmith.nn.part import speaks_for
from tunesmith.parallel.mesh import Mesh


def sum_partial(model: nn.Module, parameters: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Complete the gradients of parameters of which ranks have summands, one message for each number type.

    Along tp these are the ones that are whole on every rank but saw a part of the heads, outputs or tokens; along pp a tied
    embedding, which the first stage reads and the last one projects with.
    """
    partial = getattr(model, "summed_over_tp", ())
    _sum([p.grad for name, p in parameters.items() if name in partial and p.grad is not None], mesh, "tp")
    sum_tied = getattr(model, "sum_tied", None)
    if sum_tied is not None:
        sum_tied(parameters)


def _sum(gradients: list[Tensor], mesh: Mesh, axis: str) -> None:
    if mesh.size(axis) == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for several in by_type.values():
        flat = torch.cat([gradient.flatten() for gradient in several])
        dist.all_reduce(flat, group=mesh.group(axis))
        for gradient, total in zip(several, flat.split([gradient.numel() for gradient in several])):
            gradient.copy_(total.view_as(gradient))


def norm_over(model: nn.Module, lengths: Mapping[str, Tensor], mesh: Mesh) -> float:
    """Euclidean norm of all gradients of all ranks together, from the lengths (float32 scalars) of this rank's parts.

    What several ranks hold the same of counts once.
    """
    speaks = speaks_for(model)
    own = [length for name, length in lengths.items() if speaks(name)]
    length = float(torch.linalg.vector_norm(torch.stack(own))) if own else 0.0
    return math.sqrt(mesh.sum([length**2], AXES)[0])
