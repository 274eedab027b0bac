"""The output layer of reward models and classifiers: a few scores of a token in place of a vocabulary's logits.

B batch, T tokens, D hidden, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.nn.head import IGNORED


class ScoreHead(nn.Module):
    """hidden (..., D) -> scores (..., L) in float32, whatever the model computes in: differences of rewards are small.

    No linear layer to adapters and quantizers: it is trained whole beside them.
    """

    tied_to = None
    bias: nn.Parameter | None
    is_trained_beside_adapters = True

    def __init__(self, hidden_size: int, num_labels: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_labels)) if bias else None)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Every use of the head passes here, so that hooks on the module (fully_shard's) see it."""
        return self._project(hidden) if labels is None else self._project_labelled(hidden, labels)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., L), of every token."""
        return self(hidden)

    def scores(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, L) at the tokens whose label isn't -100, 0 elsewhere. labels: (B, T)."""
        return self(hidden, labels)

    def _project(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def _project_labelled(self, hidden: Tensor, labels: Tensor) -> Tensor:
        where = (labels != IGNORED).flatten().nonzero().squeeze(-1)
        found = self._project(hidden.flatten(0, 1)[where])
        return found.new_zeros(labels.numel(), found.shape[-1]).index_copy(0, where, found).view(*labels.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"
