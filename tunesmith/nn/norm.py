"""Root-mean-square norm (arXiv 1910.07467) in the three roundings that model families use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, computed in float32 whatever the dtype of x.

    kind says where the result is rounded to the dtype of x: "plain" before the weight, "wide" after it;
    "unit_offset" scales by 1 + weight (so that a weight of zero is neutral) and rounds after it.
    """

    def __init__(self, size: int, eps: float, kind: str = "plain"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.kind = eps, kind

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.kind == "plain":
            return self.weight * normed.to(x.dtype)
        scale = self.weight.float() + 1 if self.kind == "unit_offset" else self.weight.float()
        return (normed * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, kind={self.kind}"
