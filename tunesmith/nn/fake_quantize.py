"""Quantization-aware training: linear layers that compute with rounded weights and inputs, and learn as if they were not rounded.

What is computed is what the converted layer (`nn.int4`, `nn.float8`) will compute, operation by operation. The gradient of rounding is
taken for 1 everywhere (straight-through, arXiv 1308.3432), and not cut at the ends of a range: ranges follow the values, so that
nothing lies outside by more than rounding, and a zero there would freeze the largest weight of a group. Scales are taken for constant.

O outputs, I inputs, R rank of an adapter, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tunesmith.nn.float8 import Float8Rounding
from tunesmith.nn.int4 import Int4Rounding
from tunesmith.nn.linear import Linear, linear
from tunesmith.nn.lora import LoRALayer, LoRALinear, replace_module, retyped
from tunesmith.nn.rounding import quantizable_layers
from tunesmith.nn.scheme import Scheme


class Rounding(Protocol):
    """The arithmetic of one kind of levels, which the converted layer shares.

    A *reach* says how far the numbers go that share a scale. Where ranks hold parts of these, the largest of their reaches is that
    of the whole, and the numbers here are rounded as parts of it.
    """

    def token_reach(self, x: Tensor) -> Tensor | None:
        """(…, I) -> (…, 1 or 2), for each token; None: inputs stay as they are."""
        ...

    def weight_reach(self, weight: Tensor) -> Tensor | None:
        """(O, I) -> (O, 1); None: no scale is shared with what another rank holds."""
        ...

    def round_tokens(self, x: Tensor, reach: Tensor | None) -> Tensor:
        """What rounded inputs (…, I) stand for, in their number type."""
        ...

    def round_weight(self, weight: Tensor, reach: Tensor | None) -> Tensor:
        """What a rounded weight (O, I) stands for, in its number type."""
        ...

    def product(
        self, x: Tensor, token_reach: Tensor | None, weight: Tensor, weight_reach: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Inputs (…, I) @ weight (O, I)ᵀ + bias (O,), all of one number type, as the converted layer computes it."""
        ...


_ROUNDINGS: dict[str, Callable[[Scheme], Rounding]] = {"int4": Int4Rounding, "float8": Float8Rounding}


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
    def forward(ctx: Any, x, bias, weight, A, B, ratio, scaling: float, rounding: Rounding, over_ranks):
        dense = merged(weight, A, B, ratio, scaling).to(x.dtype)
        token_reach, weight_reach = over_ranks(rounding.token_reach(x)), over_ranks(rounding.weight_reach(dense))
        ctx.save_for_backward(x, token_reach, weight_reach, weight, A, B, ratio)
        ctx.scaling, ctx.rounding = scaling, rounding
        return rounding.product(x, token_reach, dense, weight_reach, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, token_reach, weight_reach, weight, A, B, ratio = ctx.saved_tensors
        of_x = of_bias = of_weight = of_A = of_B = of_ratio = None
        if ctx.needs_input_grad[0]:
            dense = merged(weight, A, B, ratio, ctx.scaling).to(x.dtype)
            of_x = gradient @ ctx.rounding.round_weight(dense, weight_reach)
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            of_bias = rows.sum(0)
        if not any(ctx.needs_input_grad[2:]):
            return of_x, of_bias, None, None, None, None, None, None, None
        rounded = ctx.rounding.round_tokens(x, token_reach).flatten(0, -2)
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
        return of_x, of_bias, of_weight, of_A, of_B, of_ratio, None, None, None


class FakeQuantizedLayer(nn.Module):
    """What the layers below share."""

    scheme: Scheme
    rounding: Rounding
    rounds: bool = True
    """Whether it rounds by now."""

    @staticmethod
    def over_ranks(reach: Tensor | None) -> Tensor | None:
        """The reach of whole tokens and rows from that of the part that is here; tensor parallelism, which cuts them, overrides it."""
        return reach

    def rounded_product(
        self, x: Tensor, bias: Tensor | None, weight: Tensor, A=None, B=None, ratio=None, scaling: float = 1.0
    ) -> Tensor:
        """(…, I) -> (…, O), in the number type that is computed in: that of the weight, or what autocast says."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
        arguments = x, bias, weight, A, B, ratio, scaling, self.rounding, self.over_ranks
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
        layer.scheme, layer.rounding = scheme, _ROUNDINGS[scheme.kind.levels](scheme)
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
