"""Which part of a whole tensor a rank holds: what loading, saving, initialising and measuring need to know, whatever cut it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

Range = tuple[int, int]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """Some rows of a whole tensor and, of those, one range of columns. A rank holds them in this order, one after another."""

    shape: tuple[int, ...]
    """Of the whole."""
    rows: tuple[Range, ...]
    """Ranges of dim 0."""
    columns: Range | None = None
    """Range of dim 1; None: all."""

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> Part:
        return cls(tuple(shape), ((0, shape[0]),) if len(shape) else ())

    @property
    def is_whole(self) -> bool:
        return self == Part.whole(self.shape)

    @property
    def local_shape(self) -> torch.Size:
        """Of what the rank holds."""
        if not self.shape:
            return torch.Size(())
        rows = sum(stop - start for start, stop in self.rows)
        rest = list(self.shape[1:])
        if self.columns is not None:
            rest[0] = self.columns[1] - self.columns[0]
        return torch.Size([rows, *rest])

    def take(self, whole: Tensor) -> Tensor:
        """The part out of a whole tensor; a view where its rows are one range."""
        if self.is_whole:
            return whole
        pieces = [self._columns_of(whole[start:stop]) for start, stop in self.rows or ((0, 0),)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Write what the rank holds into its place in a whole tensor."""
        if not self.shape:
            whole.copy_(local)
            return
        done = 0
        for start, stop in self.rows:
            self._columns_of(whole[start:stop]).copy_(local[done : done + stop - start])
            done += stop - start

    def _columns_of(self, rows: Tensor) -> Tensor:
        return rows if self.columns is None else rows[:, self.columns[0] : self.columns[1]]

    def local_rows(self, start: int, stop: int) -> Part:
        """The part that consists of rows start to stop of this one, counted as they lie in memory."""
        found, seen = [], 0
        for first, last in self.rows:
            begin, end = max(start, seen), min(stop, seen + last - first)
            if begin < end:
                found.append((first + begin - seen, first + end - seen))
            seen += last - first
        return replace(self, rows=tuple(found))


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that `fully_shard` may have cut: a view of its memory."""
    # Known by its method: importing DTensor takes most of a second, which a run on one device need not wait.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def shard_rows(tensor: Tensor) -> Range:
    """Rows of a parameter, as it was before `fully_shard` cut it, that lie on this rank."""
    for axis, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard():  # in pieces as torch.chunk cuts them
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            most = -(-tensor.shape[0] // mesh.size(axis))
            start = min(mesh.get_local_rank(axis) * most, tensor.shape[0])
            return start, min(start + most, tensor.shape[0])
    return 0, tensor.shape[0]


def parameter_parts(model: nn.Module) -> dict[str, Part]:
    """Name -> part of every parameter of `model` that this rank holds. `model.tensor_parts` tells what tensor parallelism cut."""
    cut: dict[str, Part] = getattr(model, "tensor_parts", {})
    parts = {}
    for name, parameter in model.named_parameters():
        part = cut.get(name) or Part.whole(parameter.shape)
        parts[name] = part.local_rows(*shard_rows(parameter)) if part.shape else part
    return parts


def speaks_for(model: nn.Module) -> Callable[[str], bool]:
    """Whether this rank, of several that hold the same of a parameter, is the one that saves it."""
    return getattr(model, "speaks_for", lambda name: True)


def by_shard(model: nn.Module, kind: type[M]) -> list[tuple[nn.Module, dict[str, M]]]:
    """(module, {full name: submodule of type `kind`}) for each module that `fully_shard` gathers at a time, or for `model`."""
    owners: dict[str, tuple[nn.Module, dict[str, M]]] = {}
    for name, module in model.named_modules():
        if not name or hasattr(module, "unshard"):
            owners[name] = (module, {})
        if isinstance(module, kind):
            owner = max((one for one in owners if not one or name == one or name.startswith(one + ".")), key=len)
            owners[owner][1][name] = module
    return list(owners.values())


def let_go(model: nn.Module) -> None:
    """Cut parameters again that `fully_shard` gathered and, with no backward pass to come, would leave whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within it the parameters that `fully_shard` cut are whole; all ranks must enter it together."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        module.reshard()  # type: ignore[operator]
