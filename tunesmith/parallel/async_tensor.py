"""Asynchronous tensor parallelism: matrix products in pieces, while other ranks' pieces come in or go out.

The compiler does it: an all-gather followed by products, and a product followed by a reduce-scatter, which sequence
parallelism makes both, become one operator each that computes a piece while the next one travels through symmetric memory,
which devices read from each other directly.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from tunesmith.configs.layout import AXES
from tunesmith.errors import UserError
from tunesmith.parallel.device import device_name, has_symmetric_memory, reads_memory_of
from tunesmith.parallel.mesh import Mesh


class Place(NamedTuple):
    """Where a rank computes."""

    rank: int
    host: str
    index: int | None
    """The device's number, as its process counts."""


def check_async_tensor_parallel(mesh: Mesh) -> None:
    """Raise the same UserError on every rank where a device can't read the memory of one that it shares matrices with."""
    own = Place(mesh.rank, platform.node(), mesh.device.index)
    others = [axis for axis in AXES if axis != "tp"]
    everyone = mesh.ranks.gather((mesh.index(*others), own))
    peers = [place for group, place in everyone if group == mesh.index(*others) and place != own]

    def look() -> None:
        if not has_symmetric_memory(mesh.device):
            raise UserError(
                "`enable_async_tensor_parallel` needs GPUs that read each other's memory (CUDA with NCCL), and the run is on "
                f"{device_name(mesh.device)}: leave it out"
            )
        if problem := link_problem(own, peers, lambda index: reads_memory_of(mesh.device, index)):
            raise UserError(problem)

    mesh.ranks.on_all(look)


def link_problem(own: Place, peers: list[Place], reads: Callable[[int], bool]) -> str | None:
    """What keeps a rank from reading the memory of its peers, in one sentence; None if nothing does.

    reads: whether its device can read that of the device with this number on the same machine.
    """
    start = "`enable_async_tensor_parallel` needs ranks that read the memory of those they share matrices with:"
    for peer in peers:
        pair = f"rank {own.rank} ({own.host}, GPU {own.index}) and rank {peer.rank} ({peer.host}, GPU {peer.index})"
        if peer.host != own.host:
            return f"{start} {pair} are on two machines; take a smaller `tensor_parallel_dim`, or leave it out"
        if peer.index == own.index:
            return f"{start} {pair} count GPUs each for itself; let every process see all of its machine's (CUDA_VISIBLE_DEVICES)"
        if peer.index is None or not reads(peer.index):
            return f"{start} {pair} are not linked; leave it out"
    return None


def pipelining_options(mesh: Mesh) -> dict[str, Any]:
    """The compiler's options with which a layer's messages along the mesh's `tp` axis travel while it computes."""
    from torch.distributed import _symmetric_memory as symmetric_memory  # late: not every build of torch has it

    with warnings.catch_warnings():
        # torch 2.13 calls it needless, and its compiler still asks whether it was called.
        warnings.simplefilter("ignore", FutureWarning)
        symmetric_memory.enable_symm_mem_for_group(mesh.group("tp").group_name)
    return {"_micro_pipeline_tp": True}
