"""Random weights for training from scratch: each parameter from a generator of its own, so that no layout changes a number."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from tunesmith.models.decoder import CausalLM
from tunesmith.nn.part import local_tensor, parameter_parts


@torch.no_grad()
def initialize(model: CausalLM, seed: int, prefix: str = "") -> None:
    """Fill every parameter of a materialised model whose name begins with `prefix`, or the part of it that is here: on
    every mesh it is drawn as a whole."""
    parts = parameter_parts(model)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            continue
        local, part = local_tensor(parameter), parts[name]
        whole = local if part.is_whole else torch.empty(part.shape, dtype=local.dtype)
        initialize_parameter(model, name, whole, seed, model.copies.get(name))
        if not part.is_whole:
            local.copy_(part.take(whole))


@torch.no_grad()
def initialize_parameter(model: CausalLM, name: str, tensor: Tensor, seed: int, drawn_as: str | None = None) -> None:
    """Fill one whole tensor as the parameter `name` would be from scratch.

    Matrices and embeddings are normal with the config's initializer_range, biases 0, norms neutral: what transformers does
    for every family here (none of them scales by depth, as torchtitan's Llama 3 does). Only the row of a padding token,
    which transformers sets to 0 and never trains, is a row like the others. The numbers depend
    on the seed, the name and the shape alone. A loader that lacks some rows fills a tensor of the parameter's shape
    and takes those rows from it. drawn_as: the parameter that this one is a copy of.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf == "bias":
        tensor.zero_()
    elif isinstance(module, nn.Module) and hasattr(module, "kind"):
        tensor.fill_(0.0 if module.kind == "unit_offset" else 1.0)
    else:
        drawn = torch.empty(tensor.shape, dtype=torch.float32)
        drawn.normal_(0.0, model.config.initializer_range, generator=generator(seed, drawn_as or name))
        tensor.copy_(drawn)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (seed, name), the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
