"""Hugging Face model repositories out: weights streamed into files, with config and tokenizer. (Reading them: load; checking: check.)"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.check import TOLERANCES, check_saved, verify
from tunesmith.checkpoint.load import load_weights, prepare_quantized, read_model_config, stated_dtype
from tunesmith.checkpoint.streamed import is_streamed, weights_here
from tunesmith.checkpoint.tensor_files import sha256_of
from tunesmith.checkpoint.write import Outgoing, write_tensors, write_text
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.models.score import ScoreModel
from tunesmith.models.weights import file_name
from tunesmith.nn.lora import ADAPTER_PARAMETERS, LoRAHead, LoRALayer, check_mergeable, is_adapters
from tunesmith.nn.part import Part, local_tensor, parameter_parts, speaks_for
from tunesmith.nn.quantize import NF4Linear
from tunesmith.nn.quantized import QuantizedLinear
from tunesmith.parallel.mesh import Ranks

__all__ = [
    "SavesFiles",
    "check_saved",
    "copy_files",
    "explain_full_disk",
    "load_weights",
    "outgoing_weights",
    "prepare_quantized",
    "read_model_config",
    "save_model",
    "save_tokenizer",
    "save_weights",
    "saved_config",
    "stage_repository",
    "stated_dtype",
    "verify",
    "write_repository",
    "write_tensors",
]

MAX_SHARD_SIZE = 5e9
"""Bytes; as transformers."""


class SavesFiles(Protocol):
    """A tokenizer, as far as a repository needs it."""

    def save(self, folder: Path) -> list[Path]: ...


def outgoing_weights(model: CausalLM, dtype: torch.dtype | None = None) -> dict[str, Outgoing]:
    """{name in a file: tensor to write} of the whole model, floating-point values in `dtype` (default: their own).

    Adapters are folded into their layers as they are written; the model stays as it is. A tied head is not written. Raises UserError for
    NF4 weights: what was rounded to 4 bits is not the model any more.
    """
    found: dict[str, Outgoing] = {}
    parts, speaks = parameter_parts(model), speaks_for(model)
    for prefix, module in model.named_modules():
        if isinstance(module, LoRALayer):
            check_mergeable(prefix, module)
        elif isinstance(module, NF4Linear):
            raise UserError(
                f"{prefix} is held in NF4: a quantized model is not saved as a repository; load it without quantize_base and save that"
            )
        elif isinstance(module, QuantizedLinear):
            raise UserError(f"{prefix} is quantized: save the model that it was made from")
        merged = module if isinstance(module, LoRALayer) else None
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf in ADAPTER_PARAMETERS:
                continue
            name = f"{prefix}.{leaf}"
            if merged and leaf == "weight":
                found[name] = _merged(merged, parameter, dtype)
            else:
                beside = model.model.weight_dtype if is_adapters(model, name) else None
                found[name] = outgoing(parameter, parts[name], speaks(name), dtype or beside)
                if is_streamed(module) and parameter.is_meta:
                    found[name] = replace(found[name], make=partial(_when_needed, module, leaf))
        if isinstance(module, LoRAHead) and module.tied_to is not None:
            found[f"{prefix}.weight"] = _merged(module, module.matrix, dtype)
    operators = getattr(model, "weights", ())
    return {file_name(operators, name): one for name, one in found.items()}


def outgoing(tensor: Tensor, part: Part, speaks: bool, dtype: torch.dtype | None = None) -> Outgoing:
    """A parameter, or the part of it that this rank holds, to be written in `dtype` (default: its own)."""
    return Outgoing(
        torch.Size(part.shape), _written(tensor, dtype), lambda: local_tensor(tensor.detach()), part, speaks
    )


def _when_needed(module: nn.Module, leaf: str) -> Tensor:
    with weights_here(module):
        return module.get_parameter(leaf).detach()


def _merged(layer: LoRALayer, weight: Tensor, dtype: torch.dtype | None) -> Outgoing:
    def make() -> Tensor:
        with weights_here(layer):
            return layer.merged_weight()

    return Outgoing(weight.shape, _written(weight, dtype), make)


def _written(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return (dtype or tensor.dtype) if tensor.dtype.is_floating_point else tensor.dtype


def saved_config(model: CausalLM, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The config.json of `model` as it is saved: number type, architecture and tie as they are in the files."""
    config = dict(model.hf_config)
    written = dtype or model.model.weight_dtype
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    config[key] = str(written).removeprefix("torch.")
    if "dtype" in config:
        config["dtype"] = config[key]
    if not set(config.get("architectures") or ()) & set(model.architectures):
        config["architectures"] = [model.architectures[0]]
    config.pop("quantization_config", None)
    head = model.head
    has_own = head is not None and (isinstance(head, LoRAHead) or head.tied_to is None)
    if not model.config.tie_word_embeddings or (has_own and "lm_head.weight" not in model.copies):
        config["tie_word_embeddings"] = False
    return config


def save_weights(
    model: CausalLM, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: float = MAX_SHARD_SIZE
) -> dict[str, str]:
    """Write the weights alone, see `outgoing_weights`; return {file: sha256}. Raises UserError for a full disk."""
    folder = Path(folder)
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return write_tensors(outgoing_weights(model, dtype), folder, "model", max_shard_size)


def stage_repository(
    model: CausalLM,
    tokenizer: SavesFiles | None = None,
    source: str | Path | None = None,
    copy: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
    ranks: Ranks | None = None,
) -> Callable[[Path], dict[str, str]]:
    """Take the model as it is now; return the function that writes it into a folder as a repository and returns {file: sha256}.

    copy: keep copies on the CPU, so that training may go on while they are written. source: the folder whose generation_config.json goes along.
    ranks: those that hold the model together, all of which call the writer. The writer lets OSError pass.
    """
    ranks = ranks or Ranks()
    weights = outgoing_weights(model, dtype)
    config = saved_config(model, dtype)
    if copy:
        weights = staged(weights)

    def write(folder: Path) -> dict[str, str]:
        digests = write_tensors(weights, folder, "model", max_shard_size, ranks)
        return digests | ranks.from_main(lambda: write_rest(folder))

    def write_rest(folder: Path) -> dict[str, str]:
        digest = write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        beside = {} if isinstance(model, ScoreModel) else copy_files(source, folder, ("generation_config.json",))
        return {"config.json": digest} | beside | save_tokenizer(tokenizer, folder)

    return write


def staged(tensors: Mapping[str, Outgoing]) -> dict[str, Outgoing]:
    """Copies on the host of what this rank will give, as it is now."""
    copies = {name: one.make().detach().to("cpu", one.dtype, copy=True) for name, one in tensors.items() if one.speaks}
    return {name: replace(tensors[name], make=lambda copied=copied: copied) for name, copied in copies.items()}


def copy_files(source: str | Path | None, folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Copy the files of `source` that match one of `patterns`; return {file: sha256}."""
    origin = Path(source) if source is not None else None
    found = {path for pattern in patterns for path in (origin.glob(pattern) if origin else ()) if path.is_file()}
    present = {str(path.relative_to(origin)): path for path in sorted(found)} if origin else {}
    for name, path in present.items():
        if path.resolve() != (folder / name).resolve():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
            _force_to_disk(folder / name)
    return {name: sha256_of(folder / name) for name in present}


def save_tokenizer(tokenizer: SavesFiles | None, folder: Path) -> dict[str, str]:
    """Let the tokenizer write its files; return {file: sha256}."""
    if tokenizer is None:
        return {}
    paths = [Path(path) for path in tokenizer.save(folder)]
    for path in paths:
        _force_to_disk(path)
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths}


def _force_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_repository(
    model: CausalLM,
    folder: str | Path,
    tokenizer: SavesFiles | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
    source: str | Path | None = None,
) -> dict[str, str]:
    """Write `model` as a repository that transformers loads; return {file: sha256}. Raises UserError for a full disk."""
    folder = Path(folder)
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return stage_repository(model, tokenizer, source, dtype=dtype, max_shard_size=max_shard_size)(folder)


def save_model(
    model: CausalLM,
    folder: str | Path,
    tokenizer: SavesFiles | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
) -> None:
    """Save a model as a repository that transformers loads: config.json, safetensors, and the tokenizer's files if one is given.

    Adapters are folded into the weights that are written; the model itself stays as it is.

    Args:
        dtype: number type of the files, such as "bfloat16"; default: the model's.
        max_shard_size: largest file in bytes.

    Raises UserError where the folder can't be written or the model is quantized.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in TOLERANCES:
        raise UserError(f"a model can't be saved as {dtype}: choose bfloat16, float16 or float32")
    folder = Path(folder)
    digests = write_repository(model, folder, tokenizer, wanted, max_shard_size, getattr(model, "source", None))
    for stale in folder.glob("model*.safetensors*"):  # of an earlier save with other shards
        if stale.name not in digests:
            stale.unlink()


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing into a sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"No space left for {folder}: free some and save again; nothing saved before is lost"
            ) from error
        raise UserError(f"{folder} can't be written ({error.strerror or error}): choose another folder") from error
