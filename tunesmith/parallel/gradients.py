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
    embedding, which the first stage reads and of which the last one projects with a copy.
    """
    partial = getattr(model, "summed_over_tp", ())
    _sum([p.grad for name, p in parameters.items() if name in partial and p.grad is not None], mesh, "tp")
    for copy, original in getattr(model, "copies", {}).items():
        _sum_with_copy([parameters[name] for name in (original, copy) if name in parameters], mesh)


def _sum_with_copy(held: list[Tensor], mesh: Mesh) -> None:
    """Give a parameter and its copy the sum of their gradients; `held`: those of the two that are on this rank.

    They are on the first and the last rank of a pipeline, or both on the first. A sum of two is the same to the bit in
    either order, so the two stay equal.
    """
    gradients = []
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(parameter.grad)
    if len(gradients) == 2:
        gradients[0] += gradients[1]
        gradients[1].copy_(gradients[0])
    elif gradients:
        gradients[0] += _exchanged(gradients[0], mesh.group("pp"), mesh.size("pp") - 1 - mesh.index("pp"))


def _exchanged(own: Tensor, group: dist.ProcessGroup, peer: int) -> Tensor:
    """What another rank of the group has, which gets `own`. The lower rank sends first: messages of a pair run in order."""
    own, other = own.contiguous(), torch.empty_like(own, memory_format=torch.contiguous_format)

    def send():
        return dist.isend(own, group=group, group_dst=peer)

    def receive():
        return dist.irecv(other, group=group, group_src=peer)

    # Not as one batch: with NCCL that would want all ranks of the group, of which only these two come here.
    order = (send, receive) if group.rank() < peer else (receive, send)
    for message in [begin() for begin in order]:
        assert message is not None
        message.wait()
    return other


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
