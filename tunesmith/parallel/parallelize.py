"""The one function that spreads a model over a mesh and decides what its activations cost. It never names a family."""

from __future__ import annotations

from torch import nn

from tunesmith.configs.shared import TrainSettings
from tunesmith.parallel.memory import apply_activation_checkpointing
from tunesmith.parallel.mesh import Mesh


def parallelize(
    model: nn.Module, layers: list[nn.Module], mesh: Mesh, plan: dict[str, str], config: TrainSettings
) -> None:
    """Change `model` (on the meta device) in place, in this order: activation checkpointing, compile per layer.

    `plan` holds the family's words for tensor parallelism; on a mesh of size one there is nothing to split.
    """
    if config.enable_activation_checkpointing:
        apply_activation_checkpointing(layers, config.ac_mode, config.ac_option)
    if config.compile:
        for layer in layers:
            layer.compile()
