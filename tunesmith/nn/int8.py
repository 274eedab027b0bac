"""Linear layers of 8-bit weights, and maybe inputs, as torchao's Int8Tensor holds them, and their arithmetic.

O outputs, I inputs, G groups of an output's inputs, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.quantized import QDATA, SCALE, ZERO_POINT, QuantizedLinear
from tunesmith.nn.scheme import Scheme

LOWEST, HIGHEST = -128, 127
_FEW_ROWS = 4
"""Up to so many, PyTorch's kernel for int8 beside 16-bit numbers is faster than widening the weight (CPU, 1024 x 4096: 0.26 ms against 1.4 for one row, 0.9 against 1.7 for 8)."""


def group_scales(x: Tensor, group_size: int) -> Tensor:
    """The step (…, G), float32, with which the largest magnitude of a group of (…, I) is 127.5 steps: torchao's SYMMETRIC."""
    largest = x.unflatten(-1, (-1, group_size)).abs().amax(-1)
    return (largest / ((HIGHEST - LOWEST) / 2)).clamp_(min=torch.finfo(torch.float32).eps).float()


def quantize_groups(x: Tensor, scales: Tensor) -> Tensor:
    """The levels of (…, I), int8."""
    groups = x.unflatten(-1, (scales.shape[-1], -1)) * (1.0 / scales)[..., None]
    return groups.round_().clamp_(LOWEST, HIGHEST).flatten(-2).to(torch.int8)


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """Levels (N, I) @ (O, I)ᵀ -> (N, O), float32: whole numbers, exact below 2^24."""
    if x.device.type == "cpu":
        return torch.ops.aten._int_mm(x, weight.t()).float()
    return F.linear(x.float(), weight.float())


class Int8Linear(QuantizedLinear):
    """Levels from -128 to 127 with float32 scales; torchao's Int8Tensor."""

    @staticmethod
    def types(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """See `QuantizedLinear`."""
        return {QDATA: torch.int8, SCALE: torch.float32, ZERO_POINT: torch.int8}

    @staticmethod
    def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """See `QuantizedLinear`."""
        scales = group_scales(weight, scheme.group_size or weight.shape[-1])
        return quantize_groups(weight, scales), scales

    @staticmethod
    def described(scheme: Scheme) -> tuple[str, dict[str, Any]]:
        """See `QuantizedLinear`."""
        row = {"_type": "PerRow", "_data": {"dim": -1}}
        symmetric = {"_type": "MappingType", "_data": "SYMMETRIC"}
        data = {"granularity": row, "mapping_type": symmetric, "reduce_range": False}
        inputs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": data} if scheme.rounds_inputs else None
        return "Int8Tensor", {"act_quant_kwargs": inputs, "reduce_range": False}

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, computed in float32."""
        groups = self.levels.unflatten(-1, (self.scales.shape[-1], -1)).float()
        return groups.mul_(self.scales[..., None]).flatten(-2).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of `input`."""
        x = input.reshape(-1, input.shape[-1])
        y = self._rounded(x) if self.scheme.rounds_inputs else self._product(x)
        y = y if self.bias is None else y + self.bias
        return y.to(input.dtype).view(*input.shape[:-1], -1)

    def _rounded(self, x: Tensor) -> Tensor:
        """x (N, I) and weight rounded; the sums are exact."""
        steps = group_scales(x, x.shape[-1])
        y = whole_product(quantize_groups(x, steps), self.levels).mul_(steps).to(x.dtype)
        return y * self.scales.flatten()

    def _product(self, x: Tensor) -> Tensor:
        if self.scales.shape[-1] > 1:
            return F.linear(x, self.dense_weight(x.dtype))
        scales = self.scales.flatten().to(x.dtype)
        if x.is_cpu and x.dtype != torch.float32 and len(x) <= _FEW_ROWS:
            return torch.ops.aten._weight_int8pack_mm(x, self.levels, scales)
        return F.linear(x, self.levels.to(x.dtype)) * scales
