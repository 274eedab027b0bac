"""Quantization-aware training: linear layers that compute with rounded weights and inputs, and learn as if they were not rounded.

What is computed is what the converted layer (`nn.int4`, torchao) will compute, operation by operation. The gradient of rounding is
taken for 1 everywhere (straight-through, arXiv 1308.3432), and not cut at the ends of a range: ranges follow the values, so that
nothing lies outside by more than rounding, and a zero there would freeze the largest weight of a group. Scales are taken for constant.

O outputs, I inputs, R rank of an adapter, N tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.nn.int4 import round_tokens, round_weight, token_range, token_scales
from tunesmith.nn.linear import Linear, linear
from tunesmith.nn.lora import LoRALayer, LoRALinear, replace_module, retyped
from tunesmith.nn.rounding import quantizable_layers
from tunesmith.nn.scheme import Scheme


def merged(weight: Tensor, A: Tensor | None, B: Tensor | None, ratio: Tensor | None, scaling: float) -> Tensor:
    """W + s B A (O, I), its rows times `ratio` (O,), in float32 and rounded once, as a merged adapter is saved; W where there is none."""
    if A is None or B is None:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        dense = torch.addmm(weight.float(), B.float(), A.float(), alpha=scaling)
    return (dense if ratio is None else dense.mul_(ratio.float()[:, None])).to(weight.dtype)


class _RoundedProduct(torch.autograd.Function):
    """x (…, I) @ (O, I)ᵀ + bias (O,) with x and weight rounded, the weight after its adapter is merged.

    Neither the merged nor a rounded matrix is kept for the backward pass, which makes them again. The adapter's gradients are
    taken through its narrow side, as without rounding: that of the whole matrix is never formed.
    """

    @staticmethod
    def forward(ctx: Any, x, scale, zero_point, bias, weight, A, B, ratio, scaling: float, group_size: int):
        ctx.save_for_backward(x, scale, zero_point, weight, A, B, ratio)
        ctx.scaling, ctx.group_size = scaling, group_size
        rounded = x if scale is None else round_tokens(x, scale, zero_point)
        dense = round_weight(merged(weight, A, B, ratio, scaling).to(x.dtype), group_size)
        return F.linear(rounded, dense, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, zero_point, weight, A, B, ratio = ctx.saved_tensors
        of_x = of_bias = of_weight = of_A = of_B = of_ratio = None
        if ctx.needs_input_grad[0]:
            dense = merged(weight, A, B, ratio, ctx.scaling).to(x.dtype)
            of_x = gradient @ round_weight(dense, ctx.group_size)
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum(0)
        if not any(ctx.needs_input_grad[4:]):
            return of_x, None, None, of_bias, None, None, None, None, None, None
        rounded = (x if scale is None else round_tokens(x, scale, zero_point)).flatten(0, -2)
        if A is None:
            of_weight = (rows.t() @ rounded).to(weight.dtype)
        else:
            low_A, low_B = A.to(x.dtype), B.to(x.dtype)
            narrow = rounded @ low_A.t()  # (N, R)
            if ratio is not None:
                product = rounded @ weight.to(x.dtype).t() + narrow @ low_B.t() * ctx.scaling
                of_ratio = (rows * product).sum(0, dtype=torch.float32).to(ratio.dtype)
                rows = rows * ratio.to(x.dtype)
            of_B = (rows.t() @ narrow * ctx.scaling).to(B.dtype)
            of_A = ((rows @ low_B).t() @ rounded * ctx.scaling).to(A.dtype)
        return of_x, None, None, of_bias, of_weight, of_A, of_B, of_ratio, None, None


class FakeQuantizedLayer(nn.Module):
    """What the layers below share."""

    scheme: Scheme
    rounds: bool = True
    """Whether it rounds by now."""

    @staticmethod
    def over_tokens(reach: Tensor) -> Tensor:
        """`token_range` of whole tokens from that of the part that is here; tensor parallelism, which cuts them, overrides it."""
        return reach

    def rounded_product(
        self, x: Tensor, bias: Tensor | None, weight: Tensor, A=None, B=None, ratio=None, scaling: float = 1.0
    ) -> Tensor:
        """(…, I) -> (…, O), in the number type that is computed in: that of the weight, or what autocast says."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
        scale = zero_point = None
        if self.scheme.rounds_inputs:
            with torch.no_grad():
                scale, zero_point = token_scales(self.over_tokens(token_range(x)))
        arguments = x, scale, zero_point, bias, weight, A, B, ratio, scaling, self.scheme.group_size
        return cast(Tensor, _RoundedProduct.apply(*arguments))


class FakeQuantizedLinear(FakeQuantizedLayer, Linear):
    """A trained linear layer that is to be quantized."""

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, I) -> (…, O)."""
        if not self.rounds:
            return linear(x, self.weight, bias)
        return self.rounded_product(x, bias, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        return self.project(input, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


class FakeQuantizedLoRALinear(FakeQuantizedLayer, LoRALinear):
    """A frozen linear layer with an adapter; the two will be merged, and then quantized.

    So the merged weight is what is rounded. To round the base alone and add the adapter beside it would train for a model that never
    is: merging moves the weights between levels, and what the adapter had learnt to repair, rounding would break again.
    Where the adapter is off, nothing is rounded: the base as it is serves as a reference.
    """

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, I) -> (…, O)."""
        if not (self.rounds and self.adapter_enabled):
            output = LoRALayer.project(self, x)
            return output if bias is None else output + bias
        with torch.autocast(x.device.type, enabled=False):
            ratio = None if self.lora_magnitude is None else self.lora_magnitude / self.row_norms()
        return self.rounded_product(x, bias, self.weight, self.lora_A, self.lora_B, ratio, self.lora.scaling)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        return self.project(input, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


_TRAINED = {nn.Linear: FakeQuantizedLinear, Linear: FakeQuantizedLinear, LoRALinear: FakeQuantizedLoRALinear}


def apply_fake_quantization(model: nn.Module, scheme: Scheme) -> list[str]:
    """Let the `quantizable_layers` of `model` be trained as quantized ones, in place; return their names.

    After `apply_lora`, if there are to be adapters. Names and values of parameters stay as they are.
    """
    names = quantizable_layers(model, scheme)
    for name in names:
        module = model.get_submodule(name)
        layer = retyped(module, _TRAINED[type(module)])
        layer.scheme = scheme
        replace_module(model, name, layer)
    return names


def fake_quantized_layers(model: nn.Module) -> list[FakeQuantizedLayer]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizedLayer)]


def set_rounding(model: nn.Module, rounds: bool) -> bool:
    """Let the fake-quantized layers of `model` round, or compute with plain numbers; whether any of them did otherwise."""
    changed = [layer for layer in fake_quantized_layers(model) if layer.rounds != rounds]
    for layer in changed:
        layer.rounds = rounds
    return bool(changed)
