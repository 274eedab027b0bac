"""4-bit weights whose inputs are rounded to 8 bits (8da4w), in the operators of torchao, which ExecuTorch hands to XNNPACK."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.configs.export import Export
from tunesmith.errors import UserError, require
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM
from tunesmith.models.families import check_speaks
from tunesmith.nn.int4 import QDATA, SCALE, ZERO_POINT, Int4Linear
from tunesmith.nn.lora import replace_module
from tunesmith.nn.scheme import Scheme


def is_dynamic_int4(source: Source, config: Export) -> bool:
    """Whether a model is quantized so; False if it isn't quantized. Raises UserError for any other, and where XNNPACK isn't to compute."""
    check_speaks(source.family, source.hf_config, f"{source.name}, to be exported as executorch,")
    content = source.hf_config.get("quantization_config")
    if not content:
        return False
    if Scheme.of_config(content).type != "int8_dynamic_int4":
        raise UserError(
            f"{source.name} is quantized in a way that ExecuTorch doesn't compute with: "
            "export the model that it was made from, or one quantized to 8da4w (int8_dynamic_int4)"
        )
    if config.program is not None and config.program.backend == "portable":
        raise UserError(f"{source.name} is quantized, which XNNPACK alone computes with: leave `program.backend` out")
    if config.dtype not in (None, "fp32"):
        raise UserError(f"{source.name} is quantized, and XNNPACK then computes in fp32: leave `dtype` out")
    return True


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
