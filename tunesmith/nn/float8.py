"""Linear layers of 8-bit floating-point weights, and maybe inputs, as torchao's Float8Tensor holds them, and their arithmetic.

Products are computed with the rounded numbers in a wider type, so any device will do.

O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.quantized import QDATA, SCALE, QuantizedLinear
from tunesmith.nn.scheme import Scheme

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def row_reach(x: Tensor) -> Tensor:
    """(…, I) -> (…, 1): the largest magnitude of each row."""
    return x.abs().amax(-1, keepdim=True)


def row_scales(reach: Tensor) -> Tensor:
    """What a `row_reach` is 448 times, (…, 1), float32; never 0. Divided in its own number type, as torchao does."""
    return (reach / LARGEST).float().clamp_(min=torch.finfo(torch.float32).smallest_normal)


def quantize_rows(x: Tensor, scales: Tensor) -> Tensor:
    """(…, I) in float8, in units of the scales."""
    return (x.float() / scales).clamp_(-LARGEST, LARGEST).to(FLOAT8)


def widened(levels: Tensor) -> Tensor:
    """Float8 numbers in float32, exactly.

    On a CPU PyTorch converts one number after the other; as whole bytes their bits are brought to where float16 has them, which
    has the same sign, mantissa and subnormals but other exponents: eight times as fast. A compiler does well by itself.
    """
    if not levels.is_cpu or torch.compiler.is_compiling():
        return levels.float()
    bits = levels.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256.0)


def dequantize_rows(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, I) in `dtype`, computed in float32."""
    return widened(levels).mul_(scales).to(dtype)


def scaled_product(x: Tensor, steps: Tensor, levels: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs (…, I), in units of `steps` (…, 1) in float8, @ levels (O, I)ᵀ times scales (O, 1), + bias (O,) -> (…, O) in the number type of x.

    In float32, also under autocast: sums of levels go beyond float16.
    """
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(widened(quantize_rows(x, steps)), widened(levels)) * steps * scales.flatten()
        return (y if bias is None else y + bias).to(x.dtype)


def _scales_of(weight: Tensor, reach: Tensor | None) -> Tensor:
    return row_scales(row_reach(weight) if reach is None else reach)


def _rounded(x: Tensor, scales: Tensor) -> Tensor:
    return dequantize_rows(quantize_rows(x, scales), scales, x.dtype)


@dataclass(frozen=True)
class Float8Rounding:
    """See `Rounding` in `nn.fake_quantize`."""

    scheme: Scheme

    def token_reach(self, x: Tensor) -> Tensor | None:
        return row_reach(x) if self.scheme.rounds_inputs else None

    def weight_reach(self, weight: Tensor) -> Tensor | None:
        return row_reach(weight)

    def round_tokens(self, x: Tensor, reach: Tensor | None) -> Tensor:
        return x if reach is None else _rounded(x, row_scales(reach))

    def round_weight(self, weight: Tensor, reach: Tensor | None) -> Tensor:
        return _rounded(weight, _scales_of(weight, reach))

    def product(
        self, x: Tensor, token_reach: Tensor | None, weight: Tensor, weight_reach: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if token_reach is None:
            return F.linear(x, self.round_weight(weight, weight_reach), bias)
        scales = _scales_of(weight, weight_reach)
        return scaled_product(x, row_scales(token_reach), quantize_rows(weight, scales), scales, bias)


class Float8Linear(QuantizedLinear):
    """Numbers in e4m3 with one float32 scale an output; torchao's Float8Tensor."""

    @staticmethod
    def types(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """See `QuantizedLinear`."""
        return {QDATA: FLOAT8, SCALE: torch.float32}

    @staticmethod
    def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """See `QuantizedLinear`."""
        scales = row_scales(row_reach(weight))
        return quantize_rows(weight, scales), scales

    @staticmethod
    def described(scheme: Scheme) -> tuple[str, dict[str, Any]]:
        """See `QuantizedLinear`."""
        auto = {"_type": "KernelPreference", "_data": "AUTO"}
        product = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}
        inputs = {
            "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
            "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mm_config": None,
            "hp_value_lb": None,
            "hp_value_ub": None,
            "kernel_preference": auto,
        }
        rounds = scheme.rounds_inputs
        return "Float8Tensor", {
            "mm_config": {"_type": "Float8MMConfig", "_data": product} if rounds else None,
            "act_quant_kwargs": {"_type": "QuantizeTensorToFloat8Kwargs", "_data": inputs} if rounds else None,
            "kernel_preference": auto,
        }

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, computed in float32."""
        return dequantize_rows(self.levels, self.scales, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of `input`."""
        if not self.scheme.rounds_inputs:
            return F.linear(input, self.dense_weight(input.dtype), self.bias)
        return scaled_product(input, row_scales(row_reach(input)), self.levels, self.scales, self.bias)
