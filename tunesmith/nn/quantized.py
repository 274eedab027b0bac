"""Frozen linear layers whose weight is held as levels and scales, as torchao's tensors have them in files.

O outputs, I inputs, G groups of an output's inputs (1 where all share a scale).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.nn.scheme import Scheme

QDATA, SCALE, ZERO_POINT = PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
"""What a quantized weight consists of, under the names it has in files."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of levels `_weight_qdata` (O, I) with `_weight_scale` (O, G), mostly `_weight_zero_point` (O, G), too.

    Subclasses say how a weight is rounded, and what is computed. `weight` reads as the dense weight, made anew at each access.
    """

    scheme: Scheme
    compute_dtype: torch.dtype
    """Of the weight before it was quantized."""

    @staticmethod
    def types(dtype: torch.dtype) -> dict[str, torch.dtype]:
        """{part: its number type} for a weight that was of `dtype`."""
        raise NotImplementedError

    @staticmethod
    def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Levels (O, I) and scales (O, G) of a weight (O, I), rounded to nearest."""
        raise NotImplementedError

    @staticmethod
    def described(scheme: Scheme) -> tuple[str, dict[str, Any]]:
        """The name of torchao's tensor and its attributes but for shape and number type, in the words of its safetensors files."""
        raise NotImplementedError

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme, parts: Collection[str] = PARTS) -> QuantizedLinear:
        """The quantized form of `linear`, without values, where it is. parts: those that the files hold."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.scheme = linear.in_features, linear.out_features, scheme
        groups = (linear.out_features, linear.in_features // (scheme.group_size or linear.in_features))
        layer.compute_dtype = linear.weight.dtype
        for name, dtype in cls.types(linear.weight.dtype).items():
            if name in parts:
                shape = linear.weight.shape if name == QDATA else groups
                empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
                layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        layer.register_parameter("bias", linear.bias)
        layer.train(linear.training)
        return layer

    @classmethod
    def of_weight(cls, linear: nn.Linear, scheme: Scheme, quantized: tuple[Tensor, Tensor] | None = None):
        """The quantized form of `linear` with values: `quantized` (levels, scales), or its weight rounded to nearest."""
        layer = cls.from_linear(linear, scheme, ())
        levels, scales = quantized or cls.quantize(linear.weight.detach(), scheme)
        for name, dtype in cls.types(linear.weight.dtype).items():
            values = {QDATA: levels, SCALE: scales}.get(name)
            values = torch.zeros_like(scales) if values is None else values
            layer.register_parameter(name, nn.Parameter(values.to(dtype), requires_grad=False))
        return layer

    @property
    def levels(self) -> Tensor:
        return self.get_parameter(QDATA)

    @property
    def scales(self) -> Tensor:
        return self.get_parameter(SCALE)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense_weight(self.compute_dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`."""
        raise NotImplementedError

    def parts(self) -> Mapping[str, Tensor]:
        """What a file holds of it."""
        return {name: parameter for name, parameter in self.named_parameters(recurse=False) if name in PARTS}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"
