"""Writing files of tensors: straight to the disk, by several ranks together, each file whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.tensor_files import DTYPES, view_bytes
from tunesmith.nn.part import Part
from tunesmith.parallel.mesh import Ranks

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # bytes, of the first tensor in files we write: what vector instructions like best
_SMALLEST_SHARED_SHARD = 256e6  # bytes; files below are not split to let several ranks write


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written, or the part of it that this rank holds; made when its turn comes."""

    shape: torch.Size
    """Of the whole."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    part: Part | None = None
    """What `make` gives of the whole; None: all."""
    speaks: bool = True
    """Whether this rank gives it: of several that hold the same, one does."""

    @property
    def size(self) -> int:
        """Of the whole, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def gives_something(self) -> bool:
        """Whether this rank has numbers of it to give."""
        return self.speaks and (self.part is None or self.part.is_whole or self.part.local_shape.numel() > 0)

    def own(self) -> Tensor:
        """What this rank holds, on the host."""
        values = self.make().detach().to("cpu", self.dtype).contiguous()
        assert values.shape == (self.shape if self.part is None else self.part.local_shape)
        return values


def write_tensors(
    tensors: Mapping[str, Tensor | Outgoing],
    folder: Path,
    stem: str,
    max_shard_size: float = 5e9,
    ranks: Ranks | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write `tensors` as `stem`.safetensors, or as shards of at most `max_shard_size` bytes (infinite: one file, always) with an index; return {file: sha256}.

    On several ranks each names the tensors of which it holds a part, and all call this together: files are dealt out over
    the ranks, and their tensors brought together one at a time by the rank that writes them.
    metadata: more of what the header of every file says.
    Each file appears under its name only when it is whole and on the disk. OSError passes through, on all ranks.
    """
    ranks = ranks or Ranks()
    outgoing = {name: _as_outgoing(tensor) for name, tensor in tensors.items()}
    spoken = {name: (one.shape, one.dtype, one.part) for name, one in outgoing.items() if one.gives_something}
    holders: dict[str, list[tuple[int, Part]]] = {}
    wholes: dict[str, Outgoing] = {}
    for rank, held in enumerate(ranks.gather(spoken)):
        for name, (shape, dtype, part) in held.items():
            holders.setdefault(name, []).append((rank, part or Part.whole(shape)))
            wholes.setdefault(name, Outgoing(shape, dtype, lambda: torch.empty(0)))
    if ranks.world_size > 1 and max_shard_size < math.inf:  # smaller files, so that several ranks write
        total = sum(one.size for one in wholes.values())
        max_shard_size = min(max_shard_size, max(total / ranks.world_size, _SMALLEST_SHARED_SHARD))
    shards = _cut(wholes, max_shard_size)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = dict(zip(names if len(shards) > 1 else [f"{stem}.safetensors"], shards))
    digests = _write_files(files, folder, outgoing, holders, ranks, metadata or {})
    if len(shards) == 1:
        return digests
    total_size = {
        "total_size": sum(one.size for one in wholes.values()),
        "total_parameters": sum(math.prod(one.shape) for one in wholes.values()),
    }
    weight_map = {name: file for file, shard in files.items() for name in shard}
    index = json.dumps({"metadata": total_size, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    path = folder / f"{stem}.safetensors.index.json"
    return digests | {path.name: ranks.from_main(lambda: write_text(path, index))}


def _write_files(
    files: dict[str, dict[str, Outgoing]],
    folder: Path,
    outgoing: dict[str, Outgoing],
    holders: dict[str, list[tuple[int, Part]]],
    ranks: Ranks,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Files go to ranks in turn; in each round every writer gets its next tensor."""
    queues: list[list[tuple[str, str]]] = [[] for _ in range(ranks.world_size)]
    for number, (file, shard) in enumerate(files.items()):
        # The format allows no gaps. With wide types first, every tensor starts at a multiple of its own type's size.
        ordered = sorted(shard, key=lambda name: -shard[name].dtype.itemsize)
        queues[number % ranks.world_size] += [(file, name) for name in ordered]
    digests: dict[str, str] = {}
    error: OSError | None = None
    writing: _Writing | None = None
    try:
        for turn in range(max(map(len, queues), default=0)):
            now = [queue[turn] if turn < len(queue) else None for queue in queues]
            whole = _bring_together(now, files, outgoing, holders, ranks)
            if whole is None or error is not None:  # whoever can't write still gives the others what is theirs
                continue
            file, name = now[ranks.rank]  # type: ignore[misc]
            try:
                if writing is None:
                    writing = _Writing(folder / file, _header(files[file], metadata))
                writing.add(view_bytes(whole))
                if turn + 1 == len(queues[ranks.rank]) or queues[ranks.rank][turn + 1][0] != file:
                    digests[file], writing = writing.finish(), None
            except OSError as raised:
                error = raised
    finally:
        if writing is not None:
            writing.abort()

    def own() -> dict[str, str]:
        if error is not None:
            raise error
        return digests

    return {file: digest for written in ranks.on_all(own) for file, digest in written.items()}


def _bring_together(
    now: list[tuple[str, str] | None],
    files: dict[str, dict[str, Outgoing]],
    outgoing: dict[str, Outgoing],
    holders: dict[str, list[tuple[int, Part]]],
    ranks: Ranks,
) -> Tensor | None:
    """Send what other ranks write in this round, and return, whole, what this one writes (None: nothing)."""
    waiting = []
    for writer, entry in enumerate(now):
        if entry is not None and writer != ranks.rank and any(rank == ranks.rank for rank, _ in holders[entry[1]]):
            waiting.append(ranks.send(outgoing[entry[1]].own(), writer))
    entry, whole = now[ranks.rank], None
    if entry is not None:
        whole = _assemble(files[entry[0]][entry[1]], holders[entry[1]], outgoing.get(entry[1]), ranks)
    for wait in waiting:
        wait()
    return whole


def _assemble(one: Outgoing, holders: list[tuple[int, Part]], own: Outgoing | None, ranks: Ranks) -> Tensor:
    if holders == [(ranks.rank, Part.whole(one.shape))]:
        assert own is not None
        return own.own()
    whole = torch.empty(one.shape, dtype=one.dtype)
    for rank, part in holders:
        if rank == ranks.rank:
            assert own is not None
            local = own.own()
        else:
            local = torch.empty(part.local_shape, dtype=one.dtype)
            ranks.receive(local, rank)
        part.put(local, whole)
    return whole


def write_text(path: Path, text: str) -> str:
    """Write a small file, whole or not at all; return its sha256."""
    writing = _Writing(path, text.encode())
    return writing.finish()


def _as_outgoing(tensor: Tensor | Outgoing) -> Outgoing:
    return tensor if isinstance(tensor, Outgoing) else Outgoing(tensor.shape, tensor.dtype, lambda: tensor)


def _cut(tensors: dict[str, Outgoing], max_size: float) -> list[dict[str, Outgoing]]:
    """Into shards, in order; a tensor larger than a shard has one for itself."""
    shards: list[dict[str, Outgoing]] = [{}]
    room = max_size
    for name, tensor in tensors.items():
        if tensor.size > room and shards[-1]:
            shards.append({})
            room = max_size
        shards[-1][name] = tensor
        room -= tensor.size
    return shards


def _header(tensors: dict[str, Outgoing], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


class _Writing:
    """A file in the making: under a temporary name, until it is whole and forced to the disk."""

    def __init__(self, path: Path, head: bytes):
        self.path, self.temporary = path, path.with_name(f".{path.name}.partial")
        self._digest = hashlib.sha256()
        self._file = open(self.temporary, "wb")
        self.add(head)

    def add(self, piece: bytes | memoryview) -> None:
        try:
            self._digest.update(piece)
            self._file.write(piece)
        except BaseException:
            self.abort()
            raise

    def finish(self) -> str:
        """Give the file its name; return its sha256."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.temporary, self.path)
        except BaseException:
            self.abort()
            raise
        return self._digest.hexdigest()

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
            self._file.close()
        self.temporary.unlink(missing_ok=True)
