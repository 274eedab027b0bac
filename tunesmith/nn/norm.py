"""Root-mean-square norm (arXiv 1910.07467) in the three roundings that model families use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        if x.is_cuda and self.kind != "unit_offset":  # one kernel there, which rounds once, at the end
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if torch.compiler.is_compiling():  # a compiler fuses plain arithmetic, and finds out itself what to keep
            wide = x.float()
            return self.scaled(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps), x)
        is_float32 = x.dtype == self.weight.dtype == torch.float32
        if torch.is_inference_mode_enabled() and is_float32 and self.kind != "unit_offset":
            # Fewer calls, and other last digits: see `linear`.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if not torch.is_grad_enabled():
            return _normed(x, self.weight, self.eps, self.kind)[0]
        return _Norm.apply(x, self.weight, self.eps, self.kind)

    def scaled(self, normed: Tensor, x: Tensor) -> Tensor:
        """x / rms(x), in float32, times the weight, rounded to the dtype of x."""
        return _scaled(normed, x, self.weight, self.kind)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, kind={self.kind}"


class _Norm(torch.autograd.Function):
    """Autograd alone would keep three tensors of the size of x, and take twice as long on a CPU; this keeps x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
        y, inverse = _normed(x, weight, eps, kind)
        ctx.save_for_backward(x, weight, inverse)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, inverse = ctx.saved_tensors
        normed, gradient = x.float() * inverse, gradient.float()
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = gradient * _scale(weight, ctx.kind)
        along = (gradient * normed).mean(-1, keepdim=True)
        return gradient.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), weight_gradient, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """The norm of x, and 1 / rms(x)."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _scaled(wide * inverse, x, weight, kind), inverse


def _scaled(normed: Tensor, x: Tensor, weight: Tensor, kind: str) -> Tensor:
    if kind == "plain":
        return normed.to(x.dtype) * weight
    return (normed * _scale(weight, kind)).to(x.dtype)


def _scale(weight: Tensor, kind: str) -> Tensor:
    return weight.float() + 1 if kind == "unit_offset" else weight.float()
