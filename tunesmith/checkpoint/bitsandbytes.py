"""NF4 weights in bitsandbytes' layout, in and out. Needs no bitsandbytes.

A weight `x.weight` is its levels, two a byte, in one column; beside it lie `x.weight.absmax`, the scales of its blocks, `.quant_map`,
the 16 levels, and `.quant_state.bitsandbytes__nf4`, JSON as bytes. With double quantization the scales are numbers of 8 bits
themselves, in blocks of 256 with `.nested_absmax`, the levels `.nested_quant_map` and an offset.

N numbers, B blocks of 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.tensor_files import HeldTensor, StoredTensor
from tunesmith.checkpoint.write import Outgoing
from tunesmith.errors import UserError
from tunesmith.nn.quantize import BLOCK_SIZE, NF4_LEVELS, quantize_nf4

_STATE = ".quant_state.bitsandbytes__"


def read_weights(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors with each quantized weight as one, `x.weight_nf4` (B, 36), see `nn.quantize`; the same where none is.

    Raises UserError for bitsandbytes' other levels, and for blocks that are no multiple of 64.
    """
    weights = {name.rpartition(_STATE)[0]: name.rpartition(_STATE)[2] for name in stored if _STATE in name}
    if not weights:
        return dict(stored)
    plain = {name: one for name, one in stored.items() if not _stems(name) & weights.keys()}
    return plain | {f"{weight}_nf4": _joined(weight, kind, stored) for weight, kind in weights.items()}


def _stems(name: str) -> set[str]:
    """What the weight may be called that a tensor is part of."""
    return {name, name.rpartition(".")[0], name.rpartition(_STATE)[0]}


def _joined(weight: str, kind: str, stored: Mapping[str, StoredTensor]) -> HeldTensor:
    packed, state = stored[weight], _read_state(weight, stored[f"{weight}{_STATE}{kind}"])
    levels = stored.get(f"{weight}.quant_map")
    if kind != "nf4" or levels is None or not torch.equal(levels.tensor(), torch.tensor(NF4_LEVELS)):
        raise UserError(f"{packed.path}: {weight} is quantized to {kind}, of which NF4's own levels alone are read")
    if state["blocksize"] % BLOCK_SIZE:
        raise UserError(
            f"{packed.path}: {weight} has blocks of {state['blocksize']}, and multiples of {BLOCK_SIZE} are read"
        )
    count = torch.Size(state["shape"]).numel()
    blocks = -(-count // BLOCK_SIZE)

    def make() -> Tensor:
        scales = _scales(weight, state, stored).repeat_interleave(state["blocksize"] // BLOCK_SIZE)[:blocks]
        joined = torch.zeros(blocks, BLOCK_SIZE // 2 + 4, dtype=torch.uint8)
        flat = packed.tensor().contiguous().view(torch.uint8).flatten()  # of whatever type the bytes are stored as
        levels = torch.zeros(blocks * BLOCK_SIZE // 2, dtype=torch.uint8)
        levels[: -(-count // 2)] = flat[: -(-count // 2)]
        joined[:, : BLOCK_SIZE // 2] = levels.view(blocks, -1)
        joined[:, BLOCK_SIZE // 2 :] = scales.float().contiguous().view(torch.uint8).view(blocks, 4)
        return joined

    return HeldTensor(packed.path, weight, torch.uint8, torch.Size((blocks, BLOCK_SIZE // 2 + 4)), make)


def _read_state(weight: str, stored: StoredTensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(stored.tensor().tolist()))
        return state | {"blocksize": int(state["blocksize"]), "shape": [int(size) for size in state["shape"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{stored.path}: what it says of {weight} can't be understood; download it again") from error


def _scales(weight: str, state: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Tensor:
    """One float32 number a block of the file's own size."""
    absmax = stored[f"{weight}.absmax"].tensor()
    if "nested_blocksize" not in state:
        return absmax
    levels = stored[f"{weight}.nested_quant_map"].tensor()
    above = stored[f"{weight}.nested_absmax"].tensor().repeat_interleave(int(state["nested_blocksize"]))
    return levels[absmax.int()] * above[: absmax.numel()] + float(state["nested_offset"])


def quantized_parts(name: str, one: Outgoing) -> Iterator[tuple[str, Outgoing]]:
    """What the weight `one`, called `name`, is written as."""
    count = one.shape.numel()
    blocks = -(-count // BLOCK_SIZE)
    state = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": str(one.dtype).removeprefix("torch.")}
    described = torch.tensor(list(json.dumps(state | {"shape": list(one.shape)}).encode()), dtype=torch.uint8)

    def quantized() -> Tensor:
        return quantize_nf4(one.own(), torch.float32)

    def levels() -> Tensor:
        return quantized()[:, : BLOCK_SIZE // 2].reshape(-1, 1)[: -(-count // 2)]

    def scales() -> Tensor:
        return quantized()[:, BLOCK_SIZE // 2 :].contiguous().view(torch.float32).flatten()

    yield name, Outgoing(torch.Size((-(-count // 2), 1)), torch.uint8, levels)
    yield f"{name}.absmax", Outgoing(torch.Size((blocks,)), torch.float32, scales)
    yield f"{name}.quant_map", Outgoing(torch.Size((16,)), torch.float32, lambda: torch.tensor(NF4_LEVELS))
    yield f"{name}{_STATE}nf4", Outgoing(described.shape, torch.uint8, lambda: described)
