"""The device mesh: one process is a mesh of size one, so nothing outside this package asks whether a run is distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunesmith.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass
class Mesh:
    """The mesh with its named axes (`pp dp_replicate dp_shard cp tp`) and the sums that a step takes over it."""

    devices: DeviceMesh
    device: torch.device
    rank: int
    world_size: int

    @property
    def dp_size(self) -> int:
        """Ranks that see different data."""
        return self.devices["dp_replicate"].size() * self.devices["dp_shard"].size()

    @property
    def dp_rank(self) -> int:
        shard = self.devices["dp_shard"]
        return self.devices["dp_replicate"].get_local_rank() * shard.size() + shard.get_local_rank()

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks to the user and writes the run folder."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of `values` over all data-parallel ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.dp_size > 1:
            for axis in ("dp_replicate", "dp_shard"):
                dist.all_reduce(totals, group=self.devices[axis].get_group())
        return totals.tolist()


def start_mesh(device: torch.device, data_parallel_replicate_dim: int = 1) -> Mesh:
    """Start the process group (on an in-memory store for one process; no port is opened) and the mesh.

    Raises UserError when more than one process was launched: layouts over several processes are not there yet.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        raise UserError(
            f"{world_size} processes were started, but training on several devices is not there yet: start one"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=rank, world_size=world_size)
    devices = init_device_mesh("cpu", (1,) * len(AXES), mesh_dim_names=AXES)
    return Mesh(devices, device, rank, world_size)


def stop_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
