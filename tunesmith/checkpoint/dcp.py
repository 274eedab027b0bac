"""Checkpoints of torch.distributed.checkpoint, as torchtitan writes them: .metadata and __*_*.distcp. The model's weights are read, nothing else.

.metadata is a pickle, which could run any code: it is read by an unpickler that knows a few names, each standing for an
inert record. The tensors in the .distcp files are read as tensors alone.

D hidden, H heads, K head size, T tokens, V vocabulary.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint import meta
from tunesmith.checkpoint.tensor_files import HeldTensor, StoredTensor
from tunesmith.errors import UserError
from tunesmith.nn.part import Part

TABLE = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex TensorProperties StorageMeta "
        "_MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "pathlib": ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"],
    "pathlib._local": ["PosixPath", "WindowsPath", "Path"],
}
"""{module: names in it that a table may hold}; all of them become records."""
_CONTAINERS = {("collections", "OrderedDict"): dict, ("builtins", "set"): set, ("torch", "Size"): tuple}
_BESIDE_THE_MODEL = re.compile(r"(optimizer|lr_scheduler|dataloader|train_state|ft_|rng)\w*([.:]|$)")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def is_dcp_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a distributed checkpoint (and no safetensors, which would be preferred)."""
    folder = Path(folder)
    return (folder / TABLE).is_file() and not any(folder.glob("*.safetensors"))


# --- the table -----------------------------------------------------------------------------------


class _Record:
    """Whatever object the table speaks of: its attributes, without its class."""

    def __init__(self, *arguments: Any):
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows the names of a checkpoint's table and no others; none of them is code."""

    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise UserError(
            f"{self._path} names {module}.{name}, which no checkpoint's table needs, and code from a file is never run: "
            "get the model as safetensors"
        )


@dataclass(frozen=True)
class _Piece:
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int

    def load(self, dtype: torch.dtype) -> Tensor:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                values = torch.load(io.BytesIO(file.read(self.length)), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{self.path} holds more than tensors, and code from a file is never run") from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.path} is damaged or cut: copy it again") from error
        if not isinstance(values, Tensor) or tuple(values.shape) != self.sizes or values.dtype != dtype:
            raise UserError(f"{self.path} holds something else than {self.path.parent / TABLE} says: copy both again")
        return values


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint, in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]

    def load(self, rows: Iterable[tuple[int, int]] | None = None) -> Tensor:
        """Its values; with `rows`, those of other rows are left undefined and their pieces unread."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            if rows is None or any(
                piece.offsets[0] < stop and start < piece.offsets[0] + piece.sizes[0] for start, stop in rows
            ):
                box = tuple(slice(offset, offset + size) for offset, size in zip(piece.offsets, piece.sizes))
                whole[box] = piece.load(self.dtype)
        return whole


def read_table(folder: str | Path) -> dict[str, _Tensor]:
    """{name: tensor, not read yet} of a checkpoint. Raises UserError for a table that is broken or asks for code, and for missing files."""
    folder = Path(folder)
    path = folder / TABLE
    try:
        table = _Unpickler(io.BytesIO(path.read_bytes()), path).load()
        return _tensors(table, folder)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        ImportError,
    ) as error:
        raise UserError(f"{path} is no table of a distributed checkpoint, or damaged: copy it again") from error


def _tensors(table: Any, folder: Path) -> dict[str, _Tensor]:
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, place in table.storage_data.items():
        places[index.fqn, tuple(getattr(index, "offset", None) or ())] = place
    found = {}
    for name, entry in table.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):  # no tensor: something pickled, which is left where it is
            continue
        shape, dtype = tuple(entry.size), entry.properties.state[0]
        pieces = tuple(_piece(places[name, tuple(chunk.offsets)], chunk, folder) for chunk in entry.chunks)
        if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
            raise UserError(
                f"{folder / TABLE}: the pieces of {name} don't make up its shape {shape}: the checkpoint isn't whole"
            )
        found[name] = _Tensor(name, dtype, shape, pieces)
    return found


def _piece(place: Any, chunk: Any, folder: Path) -> _Piece:
    file = str(place.relative_path)
    if getattr(place, "transform_descriptors", None):
        raise UserError(f"{folder / file} is compressed or encrypted, which is not read here: save it again without")
    if Path(file).name != file:
        raise UserError(f"{folder / TABLE} names a file outside its folder, {file}: it isn't read")
    if not (folder / file).is_file():
        raise UserError(f"{folder} lacks {file}, which {TABLE} names: the checkpoint isn't whole; copy it again")
    return _Piece(tuple(chunk.offsets), tuple(chunk.sizes), folder / file, int(place.offset), int(place.length))


# --- the model in it -----------------------------------------------------------------------------


def _model_tensors(folder: Path) -> dict[str, _Tensor]:
    """{name as torchtitan's or Hugging Face's model has it: tensor}: what stands beside the model, or around its names, is left out."""
    table = read_table(folder)
    if any(name.startswith("model.") for name in table) and not any(
        name.startswith(("layers.", "tok_emb")) for name in table
    ):
        own = {name: tensor for name, tensor in table.items() if name.startswith("model.")}
        is_wrapped = any(name.startswith(("model.model.", "model.tok_emb")) for name in own)
        table = {
            name.removeprefix("model.") if is_wrapped else name: tensor
            for name, tensor in table.items()
            if name in own or name.startswith("lm_head.")
        }
    found = {}
    for name, tensor in table.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if not _BESIDE_THE_MODEL.match(name):
            found[name] = tensor
    if not found:
        raise UserError(f"{folder} holds no model's weights")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """What config.json would say of torchtitan's Llama in `folder`: its shapes tell all but the size of a head and the base of
    the rotary positions, which its table of rotations (freqs_cis) tells. Raises UserError where that isn't enough."""
    folder = Path(folder)
    tensors = _model_tensors(folder)
    if "tok_embeddings.weight" not in tensors or "freqs_cis" not in tensors:
        raise UserError(
            f"the tensors in {folder} alone don't tell what model they are: put its config.json, as Hugging Face has it, beside them"
        )
    try:
        vocabulary, hidden = tensors["tok_embeddings.weight"].shape
        context, pairs = tensors["freqs_cis"].shape
        shapes = {
            name: tensors[f"layers.0.{name}.weight"].shape[0]
            for name in ("attention.wq", "attention.wk", "feed_forward.w1")
        }
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{folder} holds no model in torchtitan's Llama layout: put its config.json beside it"
        ) from error
    is_llama_3 = vocabulary >= 128_000
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes["feed_forward.w1"],
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
        "num_attention_heads": shapes["attention.wq"] // (2 * pairs),
        "num_key_value_heads": shapes["attention.wk"] // (2 * pairs),
        "head_dim": 2 * pairs,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,  # of all of torchtitan's Llamas
        "rope_theta": _rope_base(tensors["freqs_cis"].load(), folder),
        "rope_scaling": None,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": 128_000 if is_llama_3 else 1,
        "eos_token_id": 128_001 if is_llama_3 else 2,
        "initializer_range": 0.02,
        "torch_dtype": str(tensors["tok_embeddings.weight"].dtype).removeprefix("torch."),
    }


def _rope_base(rotations: Tensor, folder: Path) -> float:
    """The base, from the angles theta^(-2 j / K) by which position 1 of (T, K/2) is turned."""
    pairs = rotations.shape[1]
    angles = torch.view_as_real(rotations[1]).double()
    found = torch.atan2(angles[:, 1], angles[:, 0]).log()
    places = torch.arange(pairs, dtype=torch.float64) / pairs
    base = float(f"{math.exp(-found[-1] / places[-1]):.3g}")
    if (found + places * math.log(base)).abs().max() > 1e-3:
        raise UserError(f"{folder} has stretched rotary positions: put a config.json beside it that says how")
    return base


def read_weights(folder: str | Path, hf_config: dict[str, Any]) -> dict[str, StoredTensor]:
    """{Hugging Face's name: tensor} of the model in `folder`, torchtitan's brought to Hugging Face's rope layout as it is read.

    hf_config: what config.json says, or `read_config`.
    """
    folder = Path(folder)
    tensors = _model_tensors(folder)
    if "tok_embeddings.weight" not in tensors:
        return {name: _stored(tensor, name, None) for name, tensor in tensors.items()}
    heads = {
        "q": hf_config["num_attention_heads"],
        "k": hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"],
    }
    found = {}
    for name, tensor in tensors.items():
        if name == "freqs_cis":
            continue
        target = meta.hf_name(name, folder / TABLE)
        rotated = re.search(r"self_attn\.([qk])_proj", target)
        found[target] = _stored(tensor, name, heads[rotated[1]] if rotated else None)
    return found


def _stored(tensor: _Tensor, name: str, heads: int | None) -> StoredTensor:
    path = tensor.pieces[0].path if tensor.pieces else Path(name)
    return _DcpTensor(path, name, tensor.dtype, torch.Size(tensor.shape), tensor.load, tensor, heads)


@dataclass(frozen=True)
class _DcpTensor(HeldTensor):
    """A tensor in pieces, of which a rank reads those that it needs."""

    source: _Tensor
    heads: int | None
    """Of a query or key projection in Meta's rope layout."""

    def tensor(self) -> Tensor:
        return self._ordered(self.source.load())

    def read_into(self, target: Tensor, part: Part | None = None) -> None:
        if part is None or part.is_whole or not part.shape:
            target.copy_(self.tensor())
            return
        height = self.shape[0] // self.heads if self.heads else 1  # rows change their order within a head
        rows = [(start // height * height, -(-stop // height) * height) for start, stop in part.rows]
        target.copy_(part.take(self._ordered(self.source.load(rows))))

    def _ordered(self, whole: Tensor) -> Tensor:
        return whole if self.heads is None else meta.half_split(whole, self.heads)
