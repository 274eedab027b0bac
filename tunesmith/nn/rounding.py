"""Models whose linear layers are quantized after training: which layers, in files, in memory, or anew at each use."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.nn.float8 import Float8Linear
from tunesmith.nn.int4 import Int4Linear
from tunesmith.nn.int8 import Int8Linear
from tunesmith.nn.lora import LoRALayer, replace_module
from tunesmith.nn.quantize import NF4Linear, quantize_nf4
from tunesmith.nn.quantized import QuantizedLinear
from tunesmith.nn.scheme import Scheme

_CLASSES: dict[str, type[QuantizedLinear]] = {"int4": Int4Linear, "int8": Int8Linear, "float8": Float8Linear}


def class_of(scheme: Scheme) -> type[QuantizedLinear]:
    """What holds a weight of `scheme` in torchao's layout."""
    return _CLASSES[scheme.kind.levels]


def apply_quantized(model: nn.Module, layers: Mapping[str, Collection[str]], scheme: Scheme) -> None:
    """Give the layers of these names their quantized form, without values, in place.

    layers: {name: the parts that the files hold}. Raises UserError where one is no linear layer, or its groups don't come out even.
    """
    known = linear_layers(model)
    for name, parts in layers.items():
        if name not in known:
            raise UserError(f"{name} is quantized in the files, and is no linear layer of the model: only those can be")
        if scheme.group_size and not scheme.fits(known[name].in_features):
            raise UserError(
                f"the {known[name].in_features} inputs of {name} are no whole groups of {scheme.group_size}"
            )
        if scheme.type == "nf4":
            replace_module(model, name, NF4Linear.prequantized(known[name]))
        else:
            replace_module(model, name, class_of(scheme).from_linear(known[name], scheme, parts))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer; the output layer is none of them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def quantizable_layers(model: nn.Module, scheme: Scheme) -> list[str]:
    """Names of the linear layers (the output layer is none of them) whose inputs are whole groups."""
    return [name for name, module in linear_layers(model).items() if scheme.fits(module.in_features)]


def quantize_layer(linear: nn.Linear, scheme: Scheme, quantized: tuple[Tensor, Tensor] | None = None) -> nn.Linear:
    """The quantized form of `linear` with its values: `quantized` (levels, scales), or its weight rounded to nearest."""
    if scheme.type == "nf4":
        return NF4Linear.prequantized(linear, quantize_nf4(linear.weight, torch.float32))
    return class_of(scheme).of_weight(linear, scheme, quantized)


def merged_linear(layer: nn.Linear) -> nn.Linear:
    """The layer without its adapter, which is folded in; the layer itself where it has none."""
    if not isinstance(layer, LoRALayer):
        return layer
    weight = nn.Parameter(layer.merged_weight().to(layer.weight.dtype), requires_grad=False)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = weight, layer.bias
    return plain


@contextmanager
def rounded(
    model: nn.Module, scheme: Scheme, chosen: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> Iterator[None]:
    """Within it the `quantizable_layers` of `model` compute what their quantized form does, which is made anew at each use: one is in memory at a time.

    chosen: {layer: levels and scales}; others are rounded to nearest. The weights stay as they are.
    """
    layers = linear_layers(model)
    names = quantizable_layers(model, scheme)
    for name in names:
        layers[name].__dict__["forward"] = partial(_rounded, layers[name], scheme, (chosen or {}).get(name))
    try:
        yield
    finally:
        for name in names:
            del layers[name].__dict__["forward"]


def _rounded(layer: nn.Linear, scheme: Scheme, quantized: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
    here = None if quantized is None else (quantized[0].to(x.device), quantized[1].to(x.device))
    return quantize_layer(merged_linear(layer), scheme, here)(x)
