"""4-bit weights whose inputs are rounded to 8 bits (8da4w), in the operators of torchao, which ExecuTorch hands to XNNPACK."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.errors import require
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.int4 import QDATA, SCALE, ZERO_POINT, Int4Linear
from tunesmith.nn.lora import replace_module


def use_torchao(model: CausalLM) -> float:
    """Give the model's quantized layers torchao's operators, in place, their scales rounded to bfloat16, which is what XNNPACK holds
    them in; returns how far a scale has moved, relative to its size, at most."""
    torchao = require("torchao.quantization", "executorch", "a quantized program")
    moved = 0.0
    for name, layer in [(n, one) for n, one in model.named_modules() if isinstance(one, Int4Linear)]:
        levels, scales, zeros = (layer.get_parameter(part).detach() for part in (QDATA, SCALE, ZERO_POINT))
        rounded = scales.bfloat16().to(scales.dtype)
        moved = max(moved, ((rounded - scales) / scales).abs().max().item())
        group = (1, levels.shape[1] // scales.shape[1])
        weight = torchao.IntxUnpackedToInt8Tensor(
            levels,
            rounded,
            zeros,
            torch.int4,  # type: ignore[attr-defined]
            group,
            scales.dtype,
            "int8_asym_per_token",
        )
        replace_module(model, name, _linear(weight, layer.bias))
    require("torchao.utils", "executorch", "a quantized program").unwrap_tensor_subclass(model)
    return moved


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias  # type: ignore[assignment]
    return layer
