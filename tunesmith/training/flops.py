"""Floating-point operations of a training step, and what share of the device's peak they are (docs/pretraining.md).

A product of a token with a matrix of n numbers costs 2 n operations; the gradient of its input 2 n more, and 2 n more the
gradient of the matrix, where it is trained: 6 n in all, 4 n for a frozen one. Attention costs, for each layer and each
token seen by a token (itself included), 2 H K for the score and 2 H K for the sum of values, and twice that backward:
12 H K. Over whole rows of T tokens the causal mask lets (T + 1) / 2 of them be seen, which gives the usual
12 L H K T / 2 a token.

This counts what the method needs, not what a kernel does: nothing for activations that are recomputed, for masked scores
that are computed all the same, for norms, rotary positions, softmax or the optimizer. The embedding is a look-up and
costs nothing; the output layer is counted for the tokens that have a loss. Of E experts, whose matrices stand in stacks
(E, outputs, inputs) of a module that says how many `experts_per_token` there are, those that a token visits count.

H heads, K head size, L layers, T tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from tunesmith.models.decoder import CausalLM
from tunesmith.nn.quantize import NF4Linear
from tunesmith.parallel.device import device_name

PEAK_TFLOPS = (
    ("GB[23]00", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("RTX A6000", 154.85),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI355X", 2500.0),
    ("MI325X", 1300.0),
    ("MI300X", 1300.0),
    ("MI250X", 191.5),
)
"""(in the device's name, dense bf16 TFLOP/s with float32 sums as its maker states it); the first that fits. MI250X: one of its two dies,
which is one device to torch."""


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """What a device could do at most, in TFLOP/s; None where it isn't known, or the number type isn't one of 16 bits."""
    return _peak_of(device_name(device)) if device.type != "cpu" and dtype in ("bf16", "fp16") else None


def _peak_of(name: str) -> float | None:
    return next((peak for words, peak in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)


@dataclass(frozen=True)
class Flops:
    """What a model's training costs."""

    of_token: float
    """Matrix products of one token, the output layer's left out."""
    of_label: float
    """Those of the output layer, for one token that has a loss."""
    of_sight: float
    """Attention in one layer, for one token that sees one token."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.of_token + other.of_token, self.of_label + other.of_label, self.of_sight + other.of_sight)

    def of_step(self, num_tokens: int, num_trained: int, num_seen: int) -> float:
        """Of so many tokens, tokens with a loss, and pairs (token, token it sees) over all layers."""
        return num_tokens * self.of_token + num_trained * self.of_label + num_seen * self.of_sight


def training_flops(model: CausalLM) -> Flops:
    """What training `model` costs: the whole model, on one device or on meta, with frozen parameters marked so."""
    body = head = 0.0
    for name, module in model.named_modules():
        cost = _own_cost(module)
        if name == model.head_name:
            tied = model.head.tied_to
            head += cost + (0.0 if tied is None else _cost(tied.weight))
        elif not isinstance(module, nn.Embedding):
            body += cost
    return Flops(body, head, 12.0 * model.config.num_attention_heads * model.config.head_dim)


def forward_flops(model: CausalLM, layers: int) -> Flops:
    """What a forward pass of a frozen `model` beside a trained one of so many `layers` costs, as a part of the step's: half the matrix
    products, a third of the attention."""
    whole, share = training_flops(model), model.config.num_hidden_layers / layers
    return Flops(whole.of_token / 2, whole.of_label / 2, whole.of_sight / 3 * share)


def _own_cost(module: nn.Module) -> float:
    """For one token, of the matrices that a module itself holds."""
    frozen = (
        sum(4.0 * shape.numel() for shape in module.weight_shapes().values()) if isinstance(module, NF4Linear) else 0.0
    )
    own = [one for one in module.parameters(recurse=False) if one.is_floating_point()]
    stacks = [one for one in own if one.ndim == 3]
    visited = sum(_cost(one) * float(module.experts_per_token) / len(one) for one in stacks)  # type: ignore[arg-type]
    return frozen + visited + sum(_cost(matrix) for matrix in own if matrix.ndim == 2)


def _cost(matrix: torch.Tensor) -> float:
    return (6.0 if matrix.requires_grad else 4.0) * matrix.numel()
