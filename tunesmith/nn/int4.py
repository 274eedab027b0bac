"""Linear layers of 4-bit weights in groups, as torchao's IntxUnpackedToInt8Tensor holds them, and their arithmetic.

Every operation is done in the number type of its input, in torchao's order, so that levels and scales are the same to the bit.

O outputs, I inputs, G groups of an output's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.quantized import QDATA, SCALE, ZERO_POINT, QuantizedLinear
from tunesmith.nn.scheme import Scheme

LOWEST, HIGHEST = -8, 7


def group_scales(weight: Tensor, group_size: int) -> Tensor:
    """The scale (O, G) of each group of (O, I): the smallest with which neither -8 steps nor 7 are exceeded.

    torchao calls it SYMMETRIC_NO_CLIPPING_ERR. In its SYMMETRIC the largest magnitude is 7.5 steps, between two levels, so that in
    every group the last digit of a sum decides, and with it the layout.
    """
    low, high = torch.aminmax(weight.unflatten(-1, (-1, group_size)), dim=-1)
    scales = torch.maximum(low.clamp(max=0) / LOWEST, high.clamp(min=0) / HIGHEST)
    return scales.clamp_(min=torch.finfo(weight.dtype).smallest_normal)


def quantize_groups(weight: Tensor, scales: Tensor) -> Tensor:
    """The levels of (O, I), whole numbers from -8 to 7 in the weight's number type."""
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    return (groups * (1.0 / scales)[..., None]).round_().clamp_(LOWEST, HIGHEST).flatten(-2)


def dequantize_groups(levels: Tensor, scales: Tensor) -> Tensor:
    """(O, I) from levels, which may be int8, and scales, in the number type of the scales."""
    return (levels.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)


def round_weight(weight: Tensor, group_size: int) -> Tensor:
    """What a quantized weight (O, I) gives back when it is used."""
    scales = group_scales(weight, group_size)
    return dequantize_groups(quantize_groups(weight, scales), scales)


def token_range(x: Tensor) -> Tensor:
    """(…, I) -> (…, 2): how far each token's inputs reach below and above zero."""
    low, high = torch.aminmax(x, dim=-1)
    return torch.stack([-low, high], -1).clamp_(min=0)


def token_scales(reach: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's `token_range` the size (…, 1) of one of 255 steps, and the level (…, 1) that stands for zero."""
    below, above = reach.split(1, -1)
    scale = ((above + below) / 255).clamp(min=torch.finfo(reach.dtype).smallest_normal)
    return scale, (-128 - (-below / scale).round_()).clamp_(-128, 127)


def round_tokens(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(…, I) as it is after rounding to 8 bits."""
    levels = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(-128, 127)
    return levels.sub_(zero_point).mul_(scale)


@dataclass(frozen=True)
class Int4Rounding:
    """See `Rounding` in `nn.fake_quantize`."""

    scheme: Scheme

    def token_reach(self, x: Tensor) -> Tensor | None:
        return token_range(x) if self.scheme.rounds_inputs else None

    def weight_reach(self, weight: Tensor) -> Tensor | None:
        """None: no rank holds a part of a group."""
        return None

    def round_tokens(self, x: Tensor, reach: Tensor | None) -> Tensor:
        return x if reach is None else round_tokens(x, *token_scales(reach))

    def round_weight(self, weight: Tensor, reach: Tensor | None) -> Tensor:
        return round_weight(weight, self.scheme.group_size or weight.shape[-1])

    def product(
        self, x: Tensor, token_reach: Tensor | None, weight: Tensor, weight_reach: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        return F.linear(self.round_tokens(x, token_reach), self.round_weight(weight, weight_reach), bias)


class Int4Linear(QuantizedLinear):
    """Levels from -8 to 7, one a byte, with scales in the number type of the weight; torchao's IntxUnpackedToInt8Tensor."""

    @staticmethod
    def types(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """See `QuantizedLinear`."""
        return {QDATA: torch.int8, SCALE: dtype, ZERO_POINT: torch.int8}

    @staticmethod
    def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """See `QuantizedLinear`."""
        scales = group_scales(weight, scheme.group_size or weight.shape[-1])
        return quantize_groups(weight, scales), scales

    @staticmethod
    def described(scheme: Scheme) -> tuple[str, dict[str, Any]]:
        """See `QuantizedLinear`."""
        return "IntxUnpackedToInt8Tensor", {
            "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "activation_quantization": "int8_asym_per_token" if scheme.rounds_inputs else None,
        }

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, computed in the number type of the scales."""
        zero = self.get_parameter(ZERO_POINT)
        groups = self.levels.unflatten(-1, (self.scales.shape[-1], -1)).to(self.scales.dtype)
        return groups.sub_(zero[..., None]).mul_(self.scales[..., None]).flatten(-2).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of the scales."""
        x = input.to(self.scales.dtype)
        if self.scheme.rounds_inputs:
            x = round_tokens(x, *token_scales(token_range(x)))
        return F.linear(x, self.dense_weight(x.dtype), self.bias)
