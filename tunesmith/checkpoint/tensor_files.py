"""Reading files of tensors: safetensors straight from the disk, and PyTorch's .bin without code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UserError
from tunesmith.hub import read_weight_map
from tunesmith.nn.part import Part

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_ROWS_AT_ONCE = 16 << 20  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self) -> Tensor:
        """Its values on the CPU, if possible without reading them yet; changing them never changes the file."""
        raise NotImplementedError

    def read_into(self, target: Tensor, part: Part | None = None) -> None:
        """Copy its values, or those of `part`, into `target` of the same shape, on any device and of any number type."""
        whole = self.tensor()
        target.copy_(whole if part is None else part.take(whole))

    @property
    def is_aligned(self) -> bool:
        """Whether `tensor` needs no copy."""
        return True


@dataclass(frozen=True)
class MappedTensor(StoredTensor):
    """A tensor in a safetensors file."""

    file: SafetensorsFile
    start: int
    """Of its bytes in the file."""

    def tensor(self) -> Tensor:
        if not self.is_aligned:
            target = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(target)
            return target
        whole = self.file.storage
        flat = torch.empty(0, dtype=self.dtype)
        return flat.set_(whole, self.start // self.dtype.itemsize, self.shape)  # type: ignore[call-overload]

    def read_into(self, target: Tensor, part: Part | None = None) -> None:
        if part is None or part.is_whole:
            self._read(0, target)
            return
        done, width = 0, math.prod(self.shape[1:])
        for start, stop in part.rows:
            # Columns lie scattered: some rows are read whole at a time, and what isn't wanted is dropped.
            most = (
                stop - start if part.columns is None else max(1, _ROWS_AT_ONCE // max(width * self.dtype.itemsize, 1))
            )
            for first in range(start, stop, most):
                count = min(most, stop - first)
                own = target[done : done + count]
                done += count
                if part.columns is None:
                    self._read(first * width, own)
                    continue
                rows = torch.empty(count, *self.shape[1:], dtype=self.dtype)
                self._read(first * width, rows)
                own.copy_(rows[:, slice(*part.columns)])

    def _read(self, skipped: int, target: Tensor) -> None:
        """Fill `target` with what stands behind the first `skipped` numbers."""
        if not target.numel():
            return
        start = self.start + skipped * self.dtype.itemsize
        if target.device.type == "cpu" and target.dtype == self.dtype and target.is_contiguous():
            # One copy from the page cache, without mapping pages first.
            self.file.read(start, view_bytes(target))
        elif target.numel() == math.prod(self.shape):
            target.copy_(self.tensor())
        else:
            values = torch.empty(target.shape, dtype=self.dtype)
            self.file.read(start, view_bytes(values))
            target.copy_(values)

    @property
    def is_aligned(self) -> bool:
        return self.start % self.dtype.itemsize == 0


@dataclass(frozen=True)
class HeldTensor(StoredTensor):
    """A tensor that another reader gives."""

    make: Callable[[], Tensor]

    def tensor(self) -> Tensor:
        return self.make()


class SafetensorsFile:
    """A safetensors file, its table checked: https://github.com/huggingface/safetensors#format."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})") from error
        self._size = os.fstat(self._descriptor).st_size
        if hasattr(os, "posix_fadvise") and self._size:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

    def __del__(self):
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    @cached_property
    def storage(self) -> torch.UntypedStorage:
        """The whole file, mapped into memory so that writing to it changes private copies of its pages only."""
        return torch.UntypedStorage.from_file(str(self.path), False, self._size)  # type: ignore[return-value]

    def read(self, start: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `start`."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done : done + (1 << 30)]], start + done)
            if count <= 0:
                raise UserError(f"{self.path} ended while it was read: it was changed or cut; download it again")
            done += count

    def tensors(self) -> dict[str, MappedTensor]:
        """Name -> tensor. They hold the file, not it them: so both are let go at once when nobody needs them."""
        head = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(head, "little")
        if head.startswith(b"version "):
            raise self._broken("it is a Git LFS pointer, not the weights themselves", "run `git lfs pull`")
        if len(head) < 8 or length > min(self._size - 8, _MAX_HEADER):
            raise self._broken("its header is cut or no header at all")
        try:
            table = json.loads(os.pread(self._descriptor, length, 8))
            table.pop("__metadata__", None)
            tensors = {name: self._entry(name, entry, 8 + length) for name, entry in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken("its header can't be understood") from error
        end = max((one.start + _size_of(one) for one in tensors.values()), default=8 + length)
        if end != self._size:
            raise self._broken(f"its header tells of {end} bytes, but it has {self._size}")
        return tensors

    def _entry(self, name: str, entry: dict[str, Any], data_start: int) -> MappedTensor:
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{self.path}: the tensor {name} has the number type {entry['dtype']}, which can't be read")
        begin, end = entry["data_offsets"]
        stored = MappedTensor(
            self.path, name, DTYPES[entry["dtype"]], torch.Size(entry["shape"]), self, data_start + begin
        )
        if begin < 0 or end - begin != _size_of(stored):
            raise self._broken(f"the tensor {name} of shape {tuple(stored.shape)} has {end - begin} bytes")
        return stored

    def _broken(self, what: str, cure: str = "download it again") -> UserError:
        return UserError(f"{self.path} is no whole safetensors file: {what}; {cure}")


def view_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _size_of(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_tensor_file(path: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of a safetensors file or, without running any code in it, of a PyTorch file. Raises UserError for a broken one."""
    if path.suffix == ".safetensors":
        return dict(SafetensorsFile(path).tensors())
    return {
        name: HeldTensor(path, name, tensor.dtype, tensor.shape, lambda tensor=tensor: tensor)
        for name, tensor in load_torch_file(path).items()
    }


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a .bin, .pt or .pth file of tensors, mapped where its layout permits; code in it is never run."""
    with open(path, "rb") as file:
        if file.read(8) == b"version ":
            raise UserError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the layout before PyTorch 1.6
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and code from a file is never run: get the model as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is no whole PyTorch file: download it again, or get the model as safetensors"
        ) from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no table of tensors: get the model as safetensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def read_index(path: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of all the shards that an index file names. Raises UserError for a shard, or a tensor in one, that is missing."""
    weight_map = read_weight_map(path)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise UserError(
            f"{path.parent} lacks {_and_more(missing)} of {len(files)} weight files: the download is not complete; run it again"
        )
    shards = {file: read_tensor_file(path.parent / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise UserError(
                f"{path} says that {file} holds {name}, which it does not: the files don't belong together; download them again"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}


def read_stem(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """{name: tensor} of what `write_tensors` wrote under `stem`, in one file or in shards."""
    index = folder / f"{stem}.safetensors.index.json"
    return read_index(index) if index.is_file() else read_tensor_file(folder / f"{stem}.safetensors")


def _and_more(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
