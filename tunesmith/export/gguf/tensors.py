"""Tensors on their way into a GGUF file and back: their names, the order of their rows, their number types.

O outputs, I inputs, H heads, K head size.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.checkpoint.hf import explain_full_disk
from tunesmith.errors import UserError
from tunesmith.export.gguf.architecture import Architecture
from tunesmith.models.family import DecoderConfig

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Module of a layer -> what GGUF calls it. Of `post_attention_layernorm` see `gguf_name`."""
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

TOLERANCES = {
    "F32": 1e-6,
    "F16": 5e-4,
    "BF16": 4e-3,
    "Q8_0": 5e-3,
    "Q5_1": 0.035,
    "Q5_0": 0.065,
    "Q4_1": 0.07,
    "Q4_0": 0.13,
}
"""Number type -> the largest difference that its rounding can make, relative to the largest weight of the tensor."""


def gguf_name(name: str, norms_outputs: bool) -> str:
    """GGUF's name of a parameter. norms_outputs: whether layers norm what they add, as Gemma 2's do: `post_attention_layernorm` is that norm there."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    assert found, name
    after_attention = {"post_attention_layernorm": "post_attention_norm" if norms_outputs else "ffn_norm"}
    return f"blk.{found[1]}.{(_NAMES | after_attention)[found[2]]}.{leaf}"


@dataclass(frozen=True)
class Placed:
    """A parameter, and what becomes of it in a GGUF file."""

    name: str
    """The model's."""
    gguf: str
    shape: tuple[int, ...]
    heads: int | None = None
    """Its rows are those of so many heads, and are reordered; None: they stay."""
    offset: float = 0.0
    """Added to its values: GGUF holds the factor itself where Gemma's norms hold what it is above 1."""

    def there(self, values: Tensor) -> Tensor:
        """(O, …) float32 as the file holds it, before rounding."""
        values = neighbours_together(values, self.heads) if self.heads else values
        return values + self.offset if self.offset else values

    def back(self, values: Tensor) -> Tensor:
        """What `there` came from."""
        values = values - self.offset if self.offset else values
        return halves_apart(values, self.heads) if self.heads else values


def neighbours_together(rows: Tensor, heads: int) -> Tensor:
    """Rows (H·K, …) of queries or keys: of each head first 0, then K/2, then 1, K/2 + 1, …: what rotates together becomes neighbours."""
    pairs = rows.shape[0] // heads // 2
    return rows.view(heads, 2, pairs, -1).transpose(1, 2).reshape(rows.shape)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `neighbours_together`."""
    pairs = rows.shape[0] // heads // 2
    return rows.view(heads, pairs, 2, -1).transpose(1, 2).reshape(rows.shape)


def place(shapes: dict[str, tuple[int, ...]], architecture: Architecture, config: DecoderConfig) -> Iterator[Placed]:
    """What becomes of the parameters {name: shape}, in the same order."""
    norms_outputs = any("post_feedforward_layernorm" in name for name in shapes)
    for name, shape in shapes.items():
        heads, offset = None, 0.0
        if architecture.rotates_neighbours and (found := re.search(r"self_attn\.([qk])_proj\.", name)):
            heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        if config.norm == "unit_offset" and name.endswith("norm.weight"):
            offset = 1.0
        yield Placed(name, gguf_name(name, norms_outputs), shape, heads, offset)


# --- number types ------------------------------------------------------------------------------------


def type_of(one: Placed, wanted: str) -> Any:
    """The number type of a tensor where matrices are to have `wanted`: norms and biases are float32, and rows that are no whole blocks float16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(one.shape) < 2:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[wanted.upper()]
    return kind if one.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def stored_shape(shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and number type of the array that holds a tensor of `shape`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return shape, np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    return quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def rounded(values: Tensor, kind: Any) -> np.ndarray:
    """float32 values as the array that holds them."""
    from gguf.quants import quantize

    with np.errstate(over="ignore"):  # what float16 can't hold becomes infinite, which the comparison finds
        return quantize(values.contiguous().numpy(), kind)


def write_tensors(
    writer: Any,
    path: Path,
    made: Sequence[tuple[Placed, Callable[[], Tensor]]],
    wanted: str,
    factors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write what `writer` has been told, then each parameter as its turn comes, and force it to the disk; matrices in the number type `wanted`.

    factors: further tensors of float32, {name: values}, which come first. Raises UserError for a full disk.
    """
    extra = {name: np.array(values, dtype=np.float32) for name, values in (factors or {}).items()}
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for one, _ in made:
        kind = type_of(one, wanted)
        shape, dtype = stored_shape(one.shape, kind)
        writer.add_tensor_info(one.gguf, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=kind)
    with explain_full_disk(path.parent):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in extra.values():
                writer.write_tensor_data(values)
            for one, make in made:
                writer.write_tensor_data(rounded(one.there(make().cpu().float()), type_of(one, wanted)))
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()


@dataclass(frozen=True)
class Written:
    """A tensor in a GGUF file, not read yet."""

    path: Path
    shape: tuple[int, ...]
    kind: Any
    start: int
    """Of its bytes in the file."""
    size: int

    def dense(self) -> Tensor:
        """Its float32 values. They are read, not mapped: pages of a mapped file would stay for as long as the machine sees fit."""
        from gguf.quants import dequantize

        shape, dtype = stored_shape(self.shape, self.kind)
        stored = np.fromfile(self.path, np.uint8, self.size, offset=self.start).view(dtype).reshape(shape)
        return torch.from_numpy(dequantize(stored, self.kind).astype(np.float32, copy=False)).view(self.shape)


def read_file(path: Path) -> dict[str, Written]:
    """{name: tensor} of a GGUF file, as the `gguf` package finds them."""
    from gguf import GGUFReader

    def found(tensor: Any) -> Written:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return Written(path, shape, tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes))

    return {tensor.name: found(tensor) for tensor in GGUFReader(path).tensors}


def differences(written: Iterable[tuple[Placed, Callable[[], Tensor]]], stored: dict[str, Written]) -> dict[str, float]:
    """{number type: the largest difference of a tensor in the file from the model's, relative to the tensor's largest value}.

    written: each parameter and what makes its values anew; stored: {name: tensor of the file}, all of which must be named.
    Raises UserError for a tensor that lacks or has another shape.
    """
    found: dict[str, float] = {}
    for one, make in written:
        if one.gguf not in stored or stored[one.gguf].shape != one.shape:
            raise UserError(
                f"the file lacks {one.gguf}, or holds it in another shape: export again, and if that doesn't help report it"
            )
        ours, kind = one.there(make().float()), stored[one.gguf].kind.name
        difference = ((stored[one.gguf].dense() - ours).abs().max() / ours.abs().max().clamp_min(1e-30)).item()
        found[kind] = difference if difference != difference else max(found.get(kind, 0.0), difference)
    return found
