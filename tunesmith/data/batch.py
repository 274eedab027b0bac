"""A micro-batch: what a model and a loss need of some rows.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position without loss."""
_NOWHERE = {"index": -1}
"""What stands for padding in an extra tensor; 0 in others."""


@dataclass
class Batch:
    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64: labels[b, t] is the token to predict after input_ids[b, t], or IGNORED."""
    positions: Tensor
    """(B, T) int64: position of each token within its document."""
    documents: Tensor | None = None
    """(B, T) int32: number of the document within its row, -1 for padding; None: a row is one right-padded document."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What a method computes before the step, such as reference log-probabilities; and what the data brings:

    "values" (B, T) float32, of preference data: the value of each token's document. 1 or 0 says whether an answer is
    desirable, a pair has its margin, a text its class. "index" (B, T) int64, where it was asked for: the place of each
    token among those of all sources, -1 for padding.
    """
    counts: dict[str, int] = field(default_factory=dict)
    """How many units of each kind the loss divides by, over this micro-batch: {"tokens": labels not ignored}; of preference
    data also its "pairs", "answers" or "steps", and of pairs "chosen_tokens"."""
    most_documents: int = 1
    """No row of this micro-batch holds more documents."""

    def __post_init__(self):
        if "tokens" not in self.counts:
            self.counts["tokens"] = int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens processed, padding included."""
        return self.input_ids.numel()

    def num_seen(self, window: int | None = None) -> int:
        """Pairs (token, token of the same document it sees, itself included) under a causal mask with this window."""
        seen = self.positions + 1 if window is None else (self.positions + 1).clamp(max=window)
        return int((seen if self.documents is None else seen * (self.documents >= 0)).sum())

    def padded_to(self, length: int) -> Batch:
        """The same rows, `length` tokens long: behind them stands padding, which has no loss."""
        more = length - self.input_ids.shape[1]
        return self.map_tokens(lambda tokens, fill: F.pad(tokens, (0, more), value=fill)) if more else self

    def map_tokens(self, change: Callable[[Tensor, int], Tensor]) -> Batch:
        """The batch with change(tensor, what stands for padding) in place of every (B, T); what it counts stays as it was."""
        extra = {
            name: change(tensor, _NOWHERE.get(name, 0)) if tensor.shape[:2] == self.input_ids.shape else tensor
            for name, tensor in self.extra.items()
        }
        return replace(
            self,
            input_ids=change(self.input_ids, 0),
            labels=change(self.labels, IGNORED),
            positions=change(self.positions, 0),
            documents=None if self.documents is None else change(self.documents, -1),
            extra=extra,
        )

    def select(self, remainder: int, of: int) -> Batch:
        """The documents whose number divided by `of` leaves `remainder`, such as the chosen answers: (0, 2).

        They move to the left of their rows, numbered 0, 1, … as before; rows are as long as the longest needs.
        Extra tensors that are not (B, T, …) are left out.
        """
        if self.documents is None:
            raise ValueError("the documents of this batch are not marked")
        shape = self.input_ids.shape
        kept = (self.documents >= 0) & (self.documents % of == remainder)
        lengths = kept.sum(1)
        width = max(1, int(lengths.max()))
        order = torch.argsort(~kept, dim=1, stable=True)[:, :width]
        inside = torch.arange(width, device=order.device) < lengths[:, None]

        def taken(tensor: Tensor, fill: int) -> Tensor:
            more = (1,) * (tensor.dim() - 2)
            index = order.reshape(*order.shape, *more).expand(*order.shape, *tensor.shape[2:])
            return tensor.gather(1, index).masked_fill(~inside.reshape(*inside.shape, *more), fill)

        documents = taken(torch.div(self.documents, of, rounding_mode="floor"), -1)
        labels = taken(self.labels, IGNORED)
        answers = (documents.max(1).values + 1).sum()
        return Batch(
            taken(self.input_ids, 0),
            labels,
            taken(self.positions, 0),
            documents,
            extra={
                name: taken(tensor, _NOWHERE.get(name, 0))
                for name, tensor in self.extra.items()
                if tensor.shape[:2] == shape
            },
            counts={"tokens": int((labels != IGNORED).sum()), "answers": int(answers)},
            most_documents=max(1, self.most_documents // of),
        )

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            positions=move(self.positions),
            documents=None if self.documents is None else move(self.documents),
            extra={name: move(tensor) for name, tensor in self.extra.items()},
        )
