"""Linear layers of 8-bit floating-point weights, and maybe inputs, as torchao's Float8Tensor holds them, and their arithmetic.

Products are computed with the rounded numbers in a wider type, so any device will do.

O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.quantized import QDATA, SCALE, QuantizedLinear
from tunesmith.nn.scheme import Scheme

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def row_scales(x: Tensor) -> Tensor:
    """Of (…, I) what the largest magnitude of each row is 448 times, (…, 1), float32; never 0."""
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST).float()
    return scales.clamp_(min=torch.finfo(torch.float32).smallest_normal)


def quantize_rows(x: Tensor, scales: Tensor) -> Tensor:
    """(…, I) in float8, in units of the scales."""
    return (x.float() / scales).clamp_(-LARGEST, LARGEST).to(FLOAT8)


def widened(levels: Tensor) -> Tensor:
    """Float8 numbers in float32, exactly.

    On a CPU PyTorch converts one number after the other; as whole bytes their bits are brought to where float16 has them, which
    has the same sign, mantissa and subnormals but other exponents: eight times as fast.
    """
    if not levels.is_cpu:
        return levels.float()
    bits = levels.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256.0)


class Float8Linear(QuantizedLinear):
    """Numbers in e4m3 with one float32 scale an output; torchao's Float8Tensor."""

    @staticmethod
    def types(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """See `QuantizedLinear`."""
        return {QDATA: FLOAT8, SCALE: torch.float32}

    @staticmethod
    def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """See `QuantizedLinear`."""
        scales = row_scales(weight)
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
        return widened(self.levels).mul_(self.scales).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of `input`."""
        if not self.scheme.rounds_inputs:
            return F.linear(input, self.dense_weight(input.dtype), self.bias)
        steps = row_scales(input)
        y = F.linear(widened(quantize_rows(input, steps)), widened(self.levels)) * steps * self.scales.flatten()
        return (y if self.bias is None else y + self.bias).to(input.dtype)
