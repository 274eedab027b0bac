"""Quantized repositories out: weights in the layouts in which torchao and bitsandbytes keep them and transformers loads them.

In torchao's, a weight `x.weight` becomes two or three tensors (`nn.quantized`), and every file's header says of each tensor of the
model what it is; for bitsandbytes' see `checkpoint.bitsandbytes`. One tensor at a time is quantized, as it is written. Needs neither library.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint import bitsandbytes
from tunesmith.checkpoint.hf import MAX_SHARD_SIZE, explain_full_disk, outgoing_weights, saved_config
from tunesmith.checkpoint.write import Outgoing, write_tensors, write_text
from tunesmith.models.decoder import CausalLM
from tunesmith.models.weights import file_name
from tunesmith.nn.quantized import QDATA, SCALE
from tunesmith.nn.rounding import class_of, linear_layers, quantizable_layers
from tunesmith.nn.scheme import Scheme

Quantized = tuple[Tensor, Tensor]
"""Levels (O, I) and scales (O, G) of a weight."""


@dataclass(frozen=True)
class Written:
    """What `write_quantized` wrote."""

    digests: dict[str, str]
    """{file: sha256}."""
    plain_size: int
    """Of the weights without quantization, in bytes."""
    size: int
    """Of the weights as they are."""
    layers: tuple[str, ...]
    """Names of the layers that are quantized."""
    quantized_size: int
    """Of their weights, in bytes."""
    quantized_count: int
    """Numbers that these stand for."""


def write_quantized(
    model: CausalLM,
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    max_shard_size: float = MAX_SHARD_SIZE,
    chosen: Mapping[str, Quantized] | None = None,
) -> Written:
    """Write `model`, adapters merged, with its `quantizable_layers` quantized and the rest in `dtype`. Raises UserError for a full disk.

    Weights are first rounded to `dtype`, the number type that the model is to compute in.
    chosen: {layer: what its weight is to be}; others are rounded to nearest.
    """
    names = quantizable_layers(model, scheme)
    operators = getattr(model, "weights", ())
    layers = {file_name(operators, f"{name}.weight"): name for name in names}
    plain = outgoing_weights(model, dtype)
    tensors: dict[str, Outgoing] = {}
    parts: dict[str, dict[str, Outgoing]] = {}
    for name, one in plain.items():
        if name in layers:
            parts[name] = dict(_parts(name, one, scheme, (chosen or {}).get(layers[name])))
        tensors |= parts.get(name, {name: one})
    config = saved_config(model, dtype) | {"quantization_config": _config(model, scheme, dtype, names)}
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        metadata = None if scheme.type == "nf4" else _metadata(plain, layers, scheme, dtype)
        digests = write_tensors(tensors, folder, "model", max_shard_size, metadata=metadata)
        digests["config.json"] = write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    quantized = [one for some in parts.values() for one in some.values()]
    return Written(
        digests,
        plain_size=_size(plain.values()),
        size=_size(tensors.values()),
        layers=tuple(names),
        quantized_size=_size(quantized),
        quantized_count=sum(plain[name].shape.numel() for name in layers),
    )


def _size(some: Collection[Outgoing]) -> int:
    return sum(one.size for one in some)


def _config(model: CausalLM, scheme: Scheme, dtype: torch.dtype, names: Collection[str]) -> dict[str, Any]:
    left_out = [name for name in linear_layers(model) if name not in names]
    return scheme.to_config([model.head_name, *left_out], str(dtype).removeprefix("torch."))


def _parts(name: str, one: Outgoing, scheme: Scheme, chosen: Quantized | None) -> Iterator[tuple[str, Outgoing]]:
    """What the weight `one` is written as."""
    if scheme.type == "nf4":
        yield from bitsandbytes.quantized_parts(name, one)
        return
    prefix, kind = name.removesuffix("weight"), class_of(scheme)
    groups = torch.Size((one.shape[0], one.shape[1] // (scheme.group_size or one.shape[1])))

    def quantized() -> Quantized:
        return chosen or kind.quantize(one.own(), scheme)

    make = {QDATA: lambda: quantized()[0], SCALE: lambda: quantized()[1]}
    for part, dtype in kind.types(one.dtype).items():
        shape = one.shape if part == QDATA else groups
        yield prefix + part, Outgoing(shape, dtype, make.get(part, lambda: torch.zeros(groups)))


def _metadata(
    plain: Mapping[str, Outgoing], layers: Collection[str], scheme: Scheme, dtype: torch.dtype
) -> dict[str, str]:
    """What every file's header says: of each tensor of the model what it is, in torchao's words."""
    metadata = {"tensor_names": json.dumps(list(plain))}
    for name, one in plain.items():
        metadata[name] = json.dumps(_described(scheme, dtype, one.shape) if name in layers else {"_type": "Tensor"})
    return metadata


def _described(scheme: Scheme, dtype: torch.dtype, shape: torch.Size) -> dict[str, Any]:
    """A quantized weight in torchao's words (torchao/prototype/safetensors)."""
    kind = class_of(scheme)
    name, data = kind.described(scheme)
    data |= {"block_size": [1, scheme.group_size or shape[1]]}
    data |= {"dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}}
    return {
        "_type": name,
        "_data": data,
        "_tensor_data_names": [part.removeprefix("_weight_") for part in kind.types(dtype)],
    }
