"""The one function that spreads a model over a mesh and decides what its activations cost. It never names a family."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.configs.shared import TrainSettings
from tunesmith.errors import UserError
from tunesmith.nn.sequence_shards import SequenceShards
from tunesmith.parallel.async_tensor import pipelining_options
from tunesmith.parallel.memory import apply_activation_checkpointing
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.pipeline import cut_into_stages
from tunesmith.parallel.tensor import apply_tensor_parallel


def parallelize(
    model: nn.Module, mesh: Mesh, plan: dict[str, str], config: TrainSettings, compute_dtype: torch.dtype | None = None
) -> None:
    """Change `model` (on the meta device) in place, in this order: the stages of a pipeline, tensor parallelism by the family's
    `plan`, shared rows, activation checkpointing, compile per layer, `fully_shard`. What has a mesh of size one is left out.

    compute_dtype: number type to compute in where it isn't that of the parameters.
    """
    decoder: Any = model.model
    all_layers = list(decoder.layers.values())
    cut_into_stages(model, mesh, config)
    apply_tensor_parallel(model, plan, mesh, config.sequence_parallel, config.enable_async_tensor_parallel)
    if mesh.size("cp") > 1:
        model.sequence_shards = SequenceShards(mesh.group("cp"))  # type: ignore[assignment]
    if config.enable_activation_checkpointing:  # every n-th of all layers, whichever are here
        apply_activation_checkpointing(all_layers, config.ac_mode, config.ac_option)
    if config.compile:
        # Fused kernels keep bfloat16's intermediate results in float32, unless told otherwise: one weight in twenty would be
        # rounded to another level than the converted model's.
        options = {"emulate_precision_casts": True} if config.qat else {}
        if config.enable_async_tensor_parallel:
            options |= pipelining_options(mesh)
        for layer in decoder.layers.values():
            layer.compile(options=options or None)
    if mesh.size("dp_replicate", "dp_shard", "cp") > 1 or compute_dtype is not None or config.fsdp_cpu_offload:
        decoder.computes_in, decoder.computes_on = compute_dtype, mesh.device
        _shard(model, mesh, config, compute_dtype)
    model.speaks_for = lambda name: _speaks_for(model, mesh, name)  # type: ignore[assignment]


def _speaks_for(model: nn.Module, mesh: Mesh, name: str) -> bool:
    """Of what several ranks hold the same: of copies the first, of what tensor parallelism left whole the first rank's."""
    is_cut, is_copy = name in getattr(model, "tensor_parts", {}), name in getattr(model, "copies", {})
    return mesh.index("dp_replicate") == 0 and (is_cut or mesh.index("tp") == 0) and not is_copy


def _shard(model: Any, mesh: Mesh, config: TrainSettings, compute_dtype: torch.dtype | None) -> None:
    """Cut parameters, gradients and optimizer states over the ranks: embedding, each layer and the head apart, the final norm with the whole.

    The whole is the decoder or, in a pipeline, each stage: its schedule gathers and lets go of a stage at a time.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes most of a second

    decoder = model.model
    is_quantized = any(not parameter.dtype.is_floating_point for parameter in model.parameters())
    if is_quantized and torch.__version__ < "2.13":  # a TorchVersion, which compares as versions do
        raise UserError(
            f"`weights.quantize_base` over ranks that share weights needs torch 2.13 or newer, this is {torch.__version__}: "
            "install it, or split the model by `tensor_parallel_dim` or `pipeline_parallel_dim` alone"
        )
    reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.reduce_dtype]
    options = {
        "mesh": mesh.shards,
        "mp_policy": MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=compute_dtype is not None),
        "offload_policy": _offload(config, mesh),
    }
    again = {"always": True, "never": False, "default": mesh.size("pp") == 1}[config.fsdp_reshard_after_forward]
    head = model.head
    is_tied = head is not None and head.tied_to is not None
    if decoder.embed_tokens is not None:  # a tied head reads it after the decoder's forward
        fully_shard(decoder.embed_tokens, reshard_after_forward=again and not is_tied, **options)
    for layer in decoder.layers.values():
        fully_shard(layer, reshard_after_forward=again, **options)
    if head is not None and list(head.parameters()):  # its backward follows at once
        fully_shard(head, reshard_after_forward=False, **options)
    wholes = model.pipeline.stages if model.pipeline is not None else [decoder]
    for whole in wholes:
        fully_shard(whole, reshard_after_forward=False, **options)
    for module in [*model.modules(), *wholes]:
        if isinstance(module, FSDPModule):
            # A loss is a sum over the global batch, divided once: gradients are summed over ranks, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no division
    if mesh.size("dp_replicate") > 1:  # of the micro-batches of a step the last one alone sums over the copies
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

        def sum_over_copies(now: bool) -> None:
            for module in sharded:
                module.set_requires_all_reduce(now, recurse=False)

        model.sum_over_copies = sum_over_copies


def _offload(config: TrainSettings, mesh: Mesh):
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not config.fsdp_cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu")  # pinning needs an accelerator
