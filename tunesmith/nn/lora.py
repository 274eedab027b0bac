"""Low-rank adapters (LoRA, rsLoRA, DoRA) beside frozen linear layers, dense or NF4.

O outputs, I inputs, R rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.nn.quantize import NF4Linear, quantize_linear_layers

ADAPTER_PARAMETERS = ("lora_A", "lora_B", "lora_magnitude")


@dataclass(frozen=True)
class LoRA:
    """The settings of one adapter layer."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What the update B A is multiplied by: alpha / R (LoRA), alpha / sqrt(R) (rsLoRA, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALayer(nn.Module):
    """What adapter layers share: `lora_A` (R, I), `lora_B` (O, R), for DoRA `lora_magnitude` (O,), and the arithmetic on them.

    Subclasses say what the frozen layer computes (`project_base`) and what its weight is (`base_weight`).
    """

    lora: LoRA
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    adapter_enabled: bool = True

    def add_adapter(self, lora: LoRA, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> None:
        """Register the adapter's parameters, not yet initialised (see `reset_adapters`)."""
        self.lora, self.adapter_enabled = lora, True
        kind = {"dtype": dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs, **kind))
        self.lora_B = nn.Parameter(torch.empty(outputs, lora.rank, **kind))
        self.register_parameter("lora_magnitude", nn.Parameter(torch.empty(outputs, **kind)) if lora.use_dora else None)

    def base_weight(self) -> Tensor:
        """The frozen weight (O, I), dense."""
        raise NotImplementedError

    def project_base(self, x: Tensor) -> Tensor:
        """x (…, I) times the frozen weight: (…, O), without bias."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O): the frozen projection plus the adapter's, without bias.

        LoRA: x Wᵀ + s drop(x) Aᵀ Bᵀ (arXiv 2106.09685). DoRA: the same with every row of W + s B A scaled to length m (arXiv 2402.09353);
        as there (section 4.3) and in PEFT, no gradient flows through the row's own length, and dropout acts on x in both terms of the change.
        """
        base = self.project_base(x)
        if not self.adapter_enabled:
            return base
        drop = self.training and self.lora.dropout > 0
        dropped = F.dropout(x, self.lora.dropout) if drop else x
        # The adapter may be held in float32 beside a bfloat16 base: its gradient then arrives in float32.
        update = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.lora.scaling
        if self.lora_magnitude is None:
            return base + update
        ratio = (self.lora_magnitude / self.row_norms()).to(x.dtype)
        changed = self.project_base(dropped) if drop else base
        return base + (ratio - 1) * changed + ratio * update

    def adapted_weight(self) -> Tensor:
        """W + s B A (O, I) in float32, for DoRA before rows get their length."""
        return torch.addmm(self.base_weight().float(), self.lora_B.float(), self.lora_A.float(), alpha=self.lora.scaling)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Lengths (O,) of the rows of W + s B A, in float32; never differentiated."""
        return torch.linalg.vector_norm(self.adapted_weight(), dim=1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (O, I) in float32 that alone does what base and adapter do together."""
        weight = self.adapted_weight()
        if self.lora_magnitude is None:
            return weight
        return weight.mul_((self.lora_magnitude.float() / torch.linalg.vector_norm(weight, dim=1))[:, None])

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator, device: torch.device) -> None:
        """lora_A uniform in ±1/sqrt(I) (what kaiming_uniform_(a=sqrt 5) gives), lora_B zero, magnitudes the rows' lengths: no change yet."""
        if self.lora_A.is_meta:
            for name in ADAPTER_PARAMETERS:
                parameter = getattr(self, name)
                if parameter is not None:
                    empty = torch.empty_like(parameter, device=device)
                    setattr(self, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        self.lora_B.zero_()
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self.row_norms())

    def changes_nothing(self) -> bool:
        """Whether the adapter leaves the layer's weight exactly as it is."""
        if self.lora_B.any():
            return False
        return self.lora_magnitude is None or torch.equal(self.lora_magnitude, self.row_norms().to(self.lora_magnitude.dtype))


class LoRALinear(LoRALayer, nn.Linear):
    """A frozen dense linear layer with an adapter."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, lora: LoRA, dtype: torch.dtype | None = None) -> LoRALinear:
        """Take over the parameters of `linear`, under their names, and add the adapter's (in `dtype`; default: the weight's)."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.training = linear.in_features, linear.out_features, linear.training
        layer._take_base(linear)
        layer.register_parameter("bias", linear.bias)
        base_dtype, device = (linear.compute_dtype, linear.weight_nf4.device) if isinstance(linear, NF4Linear) else (linear.weight.dtype, linear.weight.device)
        layer.add_adapter(lora, linear.in_features, linear.out_features, dtype or base_dtype, device)
        return layer

    def _take_base(self, linear: nn.Linear) -> None:
        self.weight = linear.weight

    def base_weight(self) -> Tensor:
        return self.weight

    def project_base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        output = self.project(input)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.lora}"


class NF4LoRALinear(LoRALinear, NF4Linear):
    """A frozen NF4 linear layer with an adapter (QLoRA, arXiv 2305.14314; with use_dora: QDoRA)."""

    def _take_base(self, linear: nn.Linear) -> None:
        assert isinstance(linear, NF4Linear)
        self.compute_dtype, self.weight_nf4 = linear.compute_dtype, linear.weight_nf4

    def base_weight(self) -> Tensor:
        return self.dense_weight(torch.float32)

    def project_base(self, x: Tensor) -> Tensor:
        return self.project_quantized(x)
