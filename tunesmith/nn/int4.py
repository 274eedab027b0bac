"""Linear layers of 4-bit weights in groups, as torchao's IntxUnpackedToInt8Tensor holds them, and their arithmetic.

Every operation is done in the number type of its input, in torchao's order, so that levels and scales are the same to the bit.

O outputs, I inputs, G groups of an output's inputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.nn.scheme import Scheme

LOWEST, HIGHEST = -8, 7
QDATA, SCALE, ZERO_POINT = PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
"""What a quantized weight consists of, under the names it has in files."""


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


class Int4Linear(nn.Linear):
    """A frozen linear layer of quantized weights: levels `_weight_qdata` (O, I) in int8, `_weight_scale` and `_weight_zero_point` (O, G).

    `weight` reads as the dense weight, made anew at each access.
    """

    scheme: Scheme

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> Int4Linear:
        """The quantized form of `linear`, without values, where it is."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.scheme = linear.in_features, linear.out_features, scheme
        weight, groups = linear.weight, (linear.out_features, linear.in_features // scheme.group_size)
        for name, shape, dtype in (
            (QDATA, weight.shape, torch.int8),
            (SCALE, groups, weight.dtype),
            (ZERO_POINT, groups, torch.int8),
        ):
            empty = torch.empty(shape, dtype=dtype, device=weight.device)
            layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        layer.register_parameter("bias", linear.bias)
        layer.train(linear.training)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        scales = self.get_parameter(SCALE)
        levels, zero = self.get_parameter(QDATA), self.get_parameter(ZERO_POINT)
        groups = levels.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
        return (groups.sub_(zero[..., None]).mul_(scales[..., None])).flatten(-2)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of the scales."""
        weight = self.weight
        x = input.to(weight.dtype)
        if self.scheme.rounds_inputs:
            x = round_tokens(x, *token_scales(token_range(x)))
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


def apply_int4(model: nn.Module, names: Iterable[str], scheme: Scheme) -> None:
    """Give the layers of these names their quantized form, without values, in place. Raises UserError where one is no linear layer, or its groups don't come out even."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if name not in layers:
            raise UserError(f"{name} is quantized in the files, and is no linear layer of the model: only those can be")
        if layers[name].in_features % scheme.group_size:
            raise UserError(
                f"the {layers[name].in_features} inputs of {name} are no whole groups of {scheme.group_size}"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Int4Linear.from_linear(layers[name], scheme))
