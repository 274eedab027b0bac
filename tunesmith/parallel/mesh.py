"""The device mesh: one process is a mesh of size one, so nothing outside this package asks whether a run is distributed."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunesmith.configs.layout import AXES, Layout
from tunesmith.errors import UserError
from tunesmith.parallel.device import start_flight_recorder

T = TypeVar("T")

DATA = ("dp_replicate", "dp_shard")
"""Axes along which ranks see different rows."""
LOSS = ("pp", *DATA, "cp")
"""Axes along which ranks hold different parts of a loss: a loss is there on the last stage of a pipeline only, 0 elsewhere."""
SHARDS = ("dp_shard", "cp")
"""Axes over which parameters are cut."""
A_DAY = 86_400.0
"""Seconds that ranks wait for others where shares of the work may take very different times."""


@dataclass
class Mesh:
    """The mesh with its named axes (`pp dp_replicate dp_shard cp tp`) and what ranks tell each other along them."""

    devices: DeviceMesh
    device: torch.device
    ranks: Ranks
    """All of them, to tell each other small things."""
    layout: Layout

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def size(self, *axes: str) -> int:
        """Number of ranks along one axis, or several together."""
        sizes: dict[str, int] = dict(zip(AXES, self.devices.shape))
        return torch.Size(sizes[axis] for axis in axes).numel()

    def index(self, *axes: str) -> int:
        """This rank's place along one axis, or along several together, the last one counting fastest."""
        place = 0
        for axis in axes:
            place = place * self.size(axis) + self.devices.get_local_rank(axis)
        return place

    @cached_property
    def shards(self) -> DeviceMesh:
        """What `fully_shard` cuts parameters over: copies x parts. Ranks that share rows also share parameters."""
        names = ("pp", "dp_replicate", "shards", "tp")
        sizes = (self.size("pp"), self.size("dp_replicate"), self.size(*SHARDS), self.size("tp"))
        devices = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        return devices["dp_replicate", "shards"] if self.size("dp_replicate") > 1 else devices["shards"]

    @cached_property
    def experts(self) -> DeviceMesh:
        """The same ranks for experts, which are dealt out along `ep`; each one's parameters are cut over `expert_shards`.

        Neighbours split the experts, since they exchange every token; to a layer without experts they are ranks like others.
        """
        names, ep = ("pp", "dp_replicate", "expert_shards", "ep", "tp"), self.layout.ep
        sizes = (self.size("pp"), self.size("dp_replicate"), self.size(*SHARDS) // ep, ep, self.size("tp"))
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=names)["expert_shards", "ep"]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along `axis` alone."""
        return self.devices.get_group(axis)

    @property
    def dp_size(self) -> int:
        """Ranks that see different data."""
        return self.size(*DATA)

    @property
    def dp_rank(self) -> int:
        return self.index(*DATA)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks to the user and writes the run folder."""
        return self.rank == 0

    def node_first(self, make: Callable[[], T]) -> T:
        """`make()` on every rank, on one of each machine before the others, which then find what it left in the machine's caches."""
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        made: list[T] = []
        self.ranks.on_all(lambda: made.append(make()) if is_first else None)
        self.ranks.on_all(lambda: None if is_first else made.append(make()))
        return made[0]

    def sum(self, values: Sequence[float], axes: Sequence[str] = DATA) -> list[float]:
        """Sums of `values` over all ranks along `axes`, in float64; the same on each of them, to the bit."""
        return self._reduce(values, axes, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float], axes: Sequence[str] = AXES) -> list[float]:
        """Largest of each of `values` over all ranks along `axes`."""
        return self._reduce(values, axes, dist.ReduceOp.MAX)

    def sum_tensor(self, tensor: Tensor, axes: Sequence[str] = DATA) -> None:
        """The same of a tensor on the host, in place and in its own number type."""
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(tensor, group=self.group(axis))

    def as_on_main(self, tensor: Tensor) -> Tensor:
        """The main rank's tensor, of one shape everywhere, on every rank."""
        if self.world_size > 1:
            dist.broadcast(tensor := tensor.contiguous(), 0)
        return tensor

    def as_first(self, tensor: Tensor, axis: str) -> Tensor:
        """The tensor, of one shape on them, of the first of the ranks that differ from this one along `axis` alone."""
        if self.size(axis) > 1:
            dist.broadcast(tensor := tensor.contiguous(), group_src=0, group=self.group(axis))
        return tensor

    def _reduce(self, values: Sequence[float], axes: Sequence[str], operator: Any) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64)  # on the host: gloo serves it on every device
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(totals, operator, group=self.group(axis))
        return totals.tolist()


class Ranks:
    """All ranks of a run as they tell each other small things, and tensors on the host, through a channel of their own.

    Threads that talk at the same time need a channel each.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout: timedelta | None = None):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks; on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on every rank. An error there is raised on every rank, the same sentence."""
        return self.on_all(lambda: make() if self.is_main else None)[0]  # type: ignore[return-value]

    def on_all(self, make: Callable[[], T]) -> list[T]:
        """What `make` returns on each rank. Where it raises a UserError or OSError on any, the first of them is raised on all."""
        result, error = None, None
        try:
            result = make()
        except (UserError, OSError) as raised:
            error = raised
        outcomes = self.gather((result, error))
        for _, raised in outcomes:
            if raised is not None:
                raise raised
        return [one for one, _ in outcomes]  # type: ignore[misc]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather(None)

    def send(self, tensor: Tensor, to: int) -> Callable[[], Any]:
        """Begin to send a tensor on the host; the result waits until it has gone."""
        work = dist.isend(_bytes(tensor), to, group=self._group)
        assert work is not None
        return work.wait

    def receive(self, tensor: Tensor, sender: int) -> None:
        """Fill a contiguous tensor on the host with what `sender` sends."""
        dist.recv(_bytes(tensor), sender, group=self._group)


class Replicas:
    """Copies of a model that share work. Each is held by one rank, or by several, which do the same and answer as one."""

    def __init__(self, mesh: Mesh | None = None):
        """mesh: of the axes dp and tp alone; None: this process has the only copy."""
        self._mesh, self._ranks = mesh, Ranks() if mesh is None else mesh.ranks
        self.count, self.index = (1, 0) if mesh is None else (mesh.dp_size, mesh.dp_rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank, which may be one of several of its copy, speaks to the user."""
        return self._ranks.is_main

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This copy's share of `items`: every `count`-th."""
        return items[self.index :: self.count]

    def on_all(self, make: Callable[[], T]) -> list[T]:
        """What `make`, called on every rank, returns on the first of each copy, in their order; errors as in Ranks.on_all."""
        results = self._ranks.on_all(make)
        return results[:: len(results) // self.count]

    def agree(self, tensor: Tensor) -> Tensor:
        """That of the copy's first rank: what is rounded another way somewhere must not lead ranks of one copy apart."""
        return tensor if self._mesh is None else self._mesh.as_first(tensor, "tp")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def start_mesh(
    device: torch.device,
    layout: Layout | None = None,
    timeout_seconds: float = 600.0,
    agree: Callable[[Ranks], None] | None = None,
    reports: str | None = None,
) -> Mesh:
    """Start the process group (on an in-memory store for one process; no port is opened) and the mesh.

    reports: folder for what an accelerator's flight recorder keeps. layout: sizes of the axes; by default all processes share one copy of the weights. Raises UserError where they do not
    multiply to the number of processes that were started. agree: called when ranks can talk to each other, before anything
    hangs on their having been told the same.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if not dist.is_initialized():
        if device.type != "cpu" and reports is not None:
            start_flight_recorder(reports)
        backend = (
            "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        )
        dist.init_process_group(
            backend,
            store=_store(rank, world_size, timeout_seconds),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    ranks = Ranks(rank, world_size, timedelta(seconds=timeout_seconds))
    if agree is not None:
        agree(ranks)
    layout = layout or Layout()
    devices = init_device_mesh(device.type, layout.sizes(world_size), mesh_dim_names=AXES)
    return Mesh(devices, device, ranks, layout)


def _store(rank: int, world_size: int, timeout_seconds: float) -> Store:
    """Where processes find each other."""
    if world_size == 1:
        return HashStore()
    return fresh_store(connect_store(timeout_seconds), rank, world_size)


def connect_store(timeout_seconds: float, may_keep_it: bool = True) -> TCPStore:
    """A connection to the store that torchrun's agent keeps; where none does, rank 0 keeps it from its first connection on."""
    address, port, world_size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["WORLD_SIZE"]
    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        address,
        port,
        world_size=None if agent_keeps_it or not may_keep_it else int(world_size),
        is_master=may_keep_it and not agent_keeps_it and os.environ.get("RANK") == "0",
        timeout=timedelta(seconds=timeout_seconds),
    )


def fresh_store(store: TCPStore, rank: int, world_size: int) -> Store:
    """A part of `store` that no process of an earlier attempt has written to.

    torchrun keeps one store over restarts, where processes would read the addresses of the dead; and a node that was lost
    and came back counts restarts from 0, so the number of the attempt does not tell attempts apart. Every rank leaves a
    word that is its own, and rank 0 answers it with the name of this attempt until all have taken the name.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", own)
        attempt = store.get(f"name/{own}").decode()  # waits for it
        store.set(f"taken/{attempt}/{rank}", "")
        return PrefixStore(attempt, store)
    missing, answered = set(range(1, world_size)), set()
    deadline = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]
    while missing and time.monotonic() < deadline:
        for other in [one for one in missing if store.check([f"here/{one}"])]:
            word = store.get(f"here/{other}").decode()
            if word not in answered:
                store.set(f"name/{word}", own)
                answered.add(word)
        missing = {one for one in missing if not store.check([f"taken/{own}/{one}"])}
        time.sleep(0.01)
    return PrefixStore(own, store)  # ranks that never came are missed by whoever waits for them next


def stop_mesh() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
