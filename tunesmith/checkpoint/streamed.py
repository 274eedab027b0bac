"""A model whose weights stay in their files: a module's are read when it computes or is written, and let go of again.

So memory holds one module's weights at a time, whatever the size of the model and the layout of its files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.tensor_files import StoredTensor
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head

_STORED, _VISIT = "_weights_in_files", "_visit_of_weights"


def stream_weights(model: CausalLM, stored: Mapping[str, StoredTensor], device: torch.device | str = "cpu") -> None:
    """Let the parameters of `model` that `stored` names, which are on meta, come from there each time they are needed.

    The model then computes on `device`, and `weights_here` gives single modules their weights. Other parameters, such as adapters, must be there.
    """
    model.model.computes_on = torch.device(device)
    for name, tensor in stored.items():
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        assert module.get_parameter(leaf).is_meta
        module.__dict__.setdefault(_STORED, {})[leaf] = (tensor, model.model.computes_on)
    for module in model.modules():
        if any(is_streamed(one) for one in _holders(module)):
            module.register_forward_pre_hook(_come)
            module.register_forward_hook(_go)


def is_streamed(module: nn.Module) -> bool:
    """Whether weights of the module itself come from files."""
    return _STORED in module.__dict__


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Within it the weights that `module` computes with (for a tied head the embedding's) are in memory. Nothing to do where they always are."""
    holders = [one for one in _holders(module) if is_streamed(one)]
    before = [{leaf: one._parameters[leaf] for leaf in one.__dict__[_STORED]} for one in holders]
    for one in holders:
        for leaf, (stored, device) in one.__dict__[_STORED].items():
            if (parameter := one._parameters[leaf]) is not None and parameter.is_meta:
                one._parameters[leaf] = nn.Parameter(_read(stored, parameter.dtype, device), requires_grad=False)
    try:
        yield
    finally:
        for one, parameters in zip(holders, before):
            one._parameters.update(parameters)


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Its values in memory of our own: pages of a mapped file would stay for as long as the machine sees fit."""
    values = torch.empty(stored.shape, dtype=stored.dtype)
    stored.read_into(values)
    return values.to(device, dtype)


def _holders(module: nn.Module) -> list[nn.Module]:
    """The modules whose parameters `module` computes with: itself and, for a tied head, the embedding."""
    tied_to = module.tied_to if isinstance(module, Head) else None
    return [module] if tied_to is None else [module, tied_to]


def _come(module: nn.Module, _inputs: Any) -> None:
    stack = ExitStack()
    stack.enter_context(weights_here(module))
    module.__dict__[_VISIT] = stack


def _go(module: nn.Module, _inputs: Any, _output: Any) -> None:
    module.__dict__.pop(_VISIT).close()
