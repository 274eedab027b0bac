"""Forward and backward passes over the micro-batches of a step, on one stage or through a pipeline of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn


class MicroBatch(Protocol):
    """What a model needs of some rows (data.batch.Batch)."""

    input_ids: Tensor
    positions: Tensor
    documents: Tensor | None


B = TypeVar("B", bound=MicroBatch)
Context = Callable[[], AbstractContextManager[Any]]


def forward_backward(
    model: nn.Module, batches: Sequence[B], loss_of: Callable[[Tensor, B], Tensor], context: Context
) -> None:
    """Accumulate the gradients of `loss_of(hidden, batch)` over the micro-batches. Forward passes run within `context`."""
    for batch in batches:
        with context():
            loss = loss_of(model(batch.input_ids, batch.positions, batch.documents), batch)
        loss.backward()


def forward(model: nn.Module, batches: Sequence[B], use: Callable[[Tensor, B], None], context: Context) -> None:
    """Call `use(hidden, batch)` for each micro-batch, where hidden states come out."""
    for batch in batches:
        with context():
            use(model(batch.input_ids, batch.positions, batch.documents), batch)
