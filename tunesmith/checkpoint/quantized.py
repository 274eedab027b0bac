"""Quantized repositories out: 4-bit weights in the layout in which torchao keeps them and transformers loads them.

A weight `x.weight` becomes three tensors (`nn.int4`), and every file's header says of each tensor of the model what it is.
One tensor at a time is quantized, as it is written. Needs no torchao.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tunesmith.checkpoint.hf import MAX_SHARD_SIZE, explain_full_disk, outgoing_weights, saved_config
from tunesmith.checkpoint.tensor_files import Outgoing, write_tensors, write_text
from tunesmith.models.decoder import CausalLM
from tunesmith.models.weights import file_name
from tunesmith.nn.fake_quantize import quantizable_layers
from tunesmith.nn.int4 import QDATA, SCALE, ZERO_POINT, group_scales, quantize_groups
from tunesmith.nn.scheme import Scheme


@dataclass(frozen=True)
class Written:
    """What `write_quantized` wrote."""

    digests: dict[str, str]
    """{file: sha256}."""
    plain_size: int
    """Of the weights without quantization, in bytes."""
    size: int
    """Of the weights as they are."""


def write_quantized(
    model: CausalLM,
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    max_shard_size: float = MAX_SHARD_SIZE,
) -> Written:
    """Write `model`, adapters merged, with its `quantizable_layers` quantized and the rest in `dtype`. Raises UserError for a full disk.

    Weights are first rounded to `dtype`, the number type that the model is to compute in.
    """
    names = quantizable_layers(model, scheme)
    operators = getattr(model, "weights", ())
    chosen = {file_name(operators, f"{name}.weight") for name in names}
    plain = outgoing_weights(model, dtype)
    tensors: dict[str, Outgoing] = {}
    metadata = {"tensor_names": json.dumps(list(plain))}
    for name, one in plain.items():
        metadata[name] = json.dumps(_described(scheme, dtype) if name in chosen else {"_type": "Tensor"})
        tensors |= dict(_parts(name, one, scheme)) if name in chosen else {name: one}
    left_out = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names]
    config = saved_config(model, dtype) | {"quantization_config": scheme.to_config([model.head_name, *left_out])}
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        digests = write_tensors(tensors, folder, "model", max_shard_size, metadata=metadata)
        digests["config.json"] = write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    sizes = (sum(one.size for one in some.values()) for some in (plain, tensors))
    return Written(digests, *sizes)


def _parts(name: str, one: Outgoing, scheme: Scheme) -> Iterator[tuple[str, Outgoing]]:
    """What the weight `one` is written as."""
    prefix = name.removesuffix("weight")
    groups = torch.Size((one.shape[0], one.shape[1] // scheme.group_size))

    def levels() -> torch.Tensor:
        weight = one.own()
        return quantize_groups(weight, group_scales(weight, scheme.group_size))

    yield prefix + QDATA, Outgoing(one.shape, torch.int8, levels)
    yield prefix + SCALE, Outgoing(groups, one.dtype, lambda: group_scales(one.own(), scheme.group_size))
    yield prefix + ZERO_POINT, Outgoing(groups, torch.int8, lambda: torch.zeros(groups))


def _described(scheme: Scheme, dtype: torch.dtype) -> dict:
    """A quantized weight in torchao's words (torchao/prototype/safetensors)."""
    return {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "block_size": [1, scheme.group_size],
            "dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")},
            "activation_quantization": "int8_asym_per_token" if scheme.rounds_inputs else None,
        },
        "_tensor_data_names": [part.removeprefix("_weight_") for part in (QDATA, SCALE, ZERO_POINT)],
    }
