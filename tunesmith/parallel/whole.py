"""Whole tensors from the parts that ranks hold, for the few computations that can't be done part by part."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.nn.collectives import all_gather
from tunesmith.nn.part import Part, parameter_parts
from tunesmith.parallel.mesh import Mesh


class Wholes:
    """Brings parameters, or what is cut like them, together over the ranks of this one's stage that hold parts of them."""

    def __init__(self, model: nn.Module, mesh: Mesh):
        own = parameter_parts(model)
        self._parts = own
        self._group: Any = None
        if all(one.is_whole for held in mesh.ranks.gather(own) for one in held.values()):
            return
        place = (mesh.index("pp"), mesh.index("dp_replicate"))
        places = mesh.ranks.gather(place)
        for one in sorted(set(places)):  # every rank takes part in making every group
            members = [rank for rank, other in enumerate(places) if other == one]
            group = dist.new_group(members, timeout=mesh.ranks.timeout)
            if one == place:
                self._group, self._members = group, members
        self._held: list[dict[str, Part]] = [mesh.ranks.gather(own)[rank] for rank in self._members]

    def whole(self, name: str, local: Tensor) -> Tensor:
        """The whole of what is cut as parameter `name` is, from every rank's `local` part; on every rank."""
        if self._group is None or all(held[name].is_whole for held in self._held):
            return local
        parts = [held[name] for held in self._held]
        most = max(part.local_shape.numel() for part in parts)
        filled = local.new_zeros(most)
        filled[: local.numel()] = local.flatten()
        gathered = local.new_empty(most * len(parts))
        all_gather(gathered, filled, group=self._group)
        whole = local.new_empty(parts[0].shape)
        for part, flat in zip(parts, gathered.split(most)):
            part.put(flat[: part.local_shape.numel()].view(part.local_shape), whole)
        return whole

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        return self._parts[name].take(whole)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name].shape
