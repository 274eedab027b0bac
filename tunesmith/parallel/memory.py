"""Trading computation or host memory for activation memory: checkpointing and offloading of activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

# Attention is the costliest to recompute. The CPU's own operator must be listed too, or nothing of attention is kept there.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def apply_activation_checkpointing(
    layers: Iterable[nn.Module], mode: Literal["full", "selective"], option: int | Literal["op"]
) -> None:
    """Recompute activations of `layers` in the backward pass; gradients stay the same to the bit.

    full: every layer. selective with a number n: every n-th layer; with "op": the results of attention and of every
    second matrix product are kept, everything between is recomputed.
    """
    for index, layer in enumerate(layers):
        if mode == "full" or option == "op" or (index + 1) % int(option) == 0:
            _recompute(layer, _selective if mode == "selective" and option == "op" else None)


def _recompute(layer: nn.Module, context_fn: Any) -> None:
    forward = layer.forward
    keywords = {} if context_fn is None else {"context_fn": context_fn}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **keywords, **kwargs)

    layer.forward = recomputed


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_keep_costly())


def _keep_costly() -> Any:
    """A policy with its own counters, for one pass of one layer: those of the forward and of the recomputation must agree."""
    products = defaultdict(int)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in _MATMULS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 1
        else:
            keep = operator in _ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


class OffloadActivations(saved_tensors_hooks):
    """Within this context, large saved activations wait in pinned host memory for the backward pass.

    Copies are queued on the current stream, so they run beside the host's work and need no synchronisation of ours.
    Parameters stay where they are. On the CPU there is nowhere to move to: use `offload_activations`.
    """

    def __init__(self, min_bytes: int = 1 << 20):
        def pack(tensor: torch.Tensor) -> Any:
            weight = tensor if tensor._base is None else tensor._base  # products keep a transposed view
            if _is_on_host(tensor) or isinstance(weight, nn.Parameter) or tensor.nbytes < min_bytes:
                return tensor
            host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
            return tensor.device, host.copy_(tensor, non_blocking=True)

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, host = packed
            return host.to(device, non_blocking=True)

        super().__init__(pack, unpack)


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def offload_activations(enabled: bool, device: torch.device) -> AbstractContextManager[Any]:
    """The context for a forward pass; nothing on the CPU, whose memory is the host's already."""
    return OffloadActivations() if enabled and device.type != "cpu" else nullcontext()
