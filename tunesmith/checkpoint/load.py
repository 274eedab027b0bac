"""Model folders in: which config, which files, and their tensors streamed into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.checkpoint import bitsandbytes, dcp, meta
from tunesmith.checkpoint.tensor_files import StoredTensor, read_index, read_tensor_file
from tunesmith.errors import UserError
from tunesmith.models import families
from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.weights import model_name
from tunesmith.nn.head import Head
from tunesmith.nn.lora import ADAPTER_PARAMETERS
from tunesmith.nn.part import Part, local_tensor, parameter_parts, shard_rows
from tunesmith.nn.quantize import BLOCK_SIZE, NF4Linear, quantize_nf4
from tunesmith.nn.quantized import PARTS
from tunesmith.nn.rounding import apply_quantized
from tunesmith.nn.scheme import Scheme


def read_model_config(folder: str | Path) -> tuple[dict[str, Any], Family, DecoderConfig]:
    """Content of config.json, family and shape of the model in `folder`, in Hugging Face's layout, Meta's or torchtitan's.

    Where config.json doesn't say the number type, that of the files is filled in. Raises UserError as `models.families.model_config`.
    """
    folder = Path(folder)
    if meta.is_meta_folder(folder):
        hf_config = meta.read_config(folder)
        family = families.find_family(hf_config, str(folder / "params.json"))
        return hf_config, family, family.read_config(hf_config)
    if dcp.is_dcp_folder(folder) and not (folder / "config.json").is_file():
        hf_config = dcp.read_config(folder)
        family = families.find_family(hf_config, str(folder / dcp.TABLE))
        return hf_config, family, family.read_config(hf_config)
    hf_config, family, config = families.model_config(folder)
    if not (hf_config.get("dtype") or hf_config.get("torch_dtype")):
        types = [tensor.dtype for tensor in find_weights(folder).values() if tensor.dtype.is_floating_point]
        hf_config = {**hf_config, "torch_dtype": str(max(types, key=types.count)).removeprefix("torch.")}
    return hf_config, family, config


def stated_dtype(hf_config: Mapping[str, Any]) -> torch.dtype:
    """The number type that a config.json names; float32 where it names none."""
    name = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"config.json names the number type {name}, which there is not: write bfloat16, float16 or float32"
        )
    return dtype


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """{name in the files: tensor, not read yet} of a model folder: safetensors (one file or shards with an index), PyTorch's
    .bin without safetensors, Meta's consolidated.*.pth, or a distributed checkpoint. Raises UserError for a missing or broken file, named.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return bitsandbytes.read_weights(read_tensor_file(folder / stem))
        if (folder / f"{stem}.index.json").is_file():
            return bitsandbytes.read_weights(read_index(folder / f"{stem}.index.json"))
    if meta.is_meta_folder(folder):
        return meta.read_weights(folder)
    if dcp.is_dcp_folder(folder):
        has_own = (folder / "config.json").is_file()
        return dcp.read_weights(folder, families.model_config(folder)[0] if has_own else dcp.read_config(folder))
    raise UserError(
        f"{folder} holds no weights: it needs model.safetensors, or model.safetensors.index.json and the files it names"
    )


@dataclass
class _Target:
    """Where in the model a tensor belongs."""

    module: nn.Module
    leaf: str
    part: Part
    """What of the whole tensor is kept here; of a quantized layer before `fully_shard` cuts its blocks."""
    is_quantized: bool

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter("weight_nf4" if self.is_quantized else self.leaf)

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size(self.part.shape)

    @property
    def may_grow(self) -> bool:
        """Whether rows stand for tokens."""
        return isinstance(self.module, (nn.Embedding, Head))


def _targets(model: nn.Module) -> dict[str, _Target]:
    """Name -> place of everything that a checkpoint of the (base) model holds."""
    found, parts = {}, parameter_parts(model)
    cut: dict[str, Part] = getattr(model, "tensor_parts", {})
    for prefix, module in model.named_modules():
        quantized = {}
        if isinstance(module, NF4Linear) and not module.is_prequantized:
            quantized = module.weight_shapes()
        for leaf, shape in quantized.items():
            found[f"{prefix}.{leaf}"] = _Target(module, leaf, cut.get(f"{prefix}.{leaf}") or Part.whole(shape), True)
        for leaf, _ in module.named_parameters(recurse=False):
            if leaf not in ADAPTER_PARAMETERS and not (quantized and leaf == "weight_nf4"):
                found[f"{prefix}.{leaf}"] = _Target(module, leaf, parts[f"{prefix}.{leaf}"], False)
    return found


def prepare_quantized(model: CausalLM, folder: str | Path) -> None:
    """Let the layers whose weights are quantized in `folder` take them as they are; without values, like the rest."""
    content = model.hf_config.get("quantization_config")
    if not content:
        return
    layers: dict[str, list[str]] = {}
    for name in find_weights(Path(folder)):
        layer, _, part = name.rpartition(".")
        if part in (*PARTS, "weight_nf4"):
            wanted = model_name(model.weights, f"{layer}.weight")
            layers.setdefault((wanted or "").removesuffix(".weight"), []).append(part)
    apply_quantized(model, layers, Scheme.of_config(content))


def load_weights(
    model: CausalLM,
    folder: str | Path,
    family: Family | None = None,
    new_rows_from: int | None = None,
    device: torch.device | str = "cpu",
    without: str | None = None,
) -> None:
    """Read the weights in `folder` into `model`, tensor by tensor; adapters are left as they are. On a mesh each rank reads its own part.

    Parameters that have memory get a copy, in their own number type and on their own device. Parameters on meta are made on `device`; on the
    CPU, where number type and address permit, without reading: their memory is the mapped file, private pages being made where it is changed.
    NF4 layers quantize what arrives.

    new_rows_from: the rows that embedding and head have in the files, where the model has more: rows beyond start at the mean of the old ones.

    without: what the names of parameters begin with that are left as they are, whether the files hold them or not.

    Raises UserError, naming file and tensor, for files that are missing or broken, shapes that differ, and tensors that lack or are left over.
    """
    targets, stored = _matched(model, Path(folder), family, new_rows_from, without)
    place = torch.device(device)
    busy: list[str] = []
    for name, target in targets.items():
        if _is_mapped(target, stored[name], place):
            _replace(target, stored[name].tensor())
        else:
            busy.append(name)
    busy.sort(key=lambda name: -targets[name].shape.numel())  # large ones first, so that all threads end together
    # A few threads hide the disk, and the making of fresh memory, behind the copying.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda name: _load_one(targets[name], stored[name], place), busy):
            pass


def _matched(
    model: CausalLM, folder: Path, family: Family | None, new_rows_from: int | None, without: str | None
) -> tuple[dict[str, _Target], dict[str, StoredTensor]]:
    """{parameter: its place} and {parameter: its tensor in the files} of all that `load_weights` would load, names and shapes checked."""
    targets = {
        name: target for name, target in _targets(model).items() if without is None or not name.startswith(without)
    }
    sources: dict[str | None, StoredTensor] = {}
    operators = getattr(model, "weights", family.weights if family else ())
    originals = {name: model.copies.get(name, name) for name in targets}
    unexpected = []
    for name, tensor in find_weights(folder).items():
        wanted = model_name(operators, name)
        sources[wanted] = tensor
        is_left = without is not None and wanted is not None and wanted.startswith(without)
        is_known = (
            is_left or wanted is None or wanted.endswith(".rotary_emb.inv_freq") or wanted.startswith(model.elsewhere)
        )
        if not is_known and wanted not in originals.values():
            unexpected.append(name)
    stored = {name: sources[original] for name, original in originals.items() if original in sources}
    _check_names(folder, sorted(targets.keys() - stored.keys()), unexpected)
    for name, target in targets.items():
        _check_shape(name, target, stored[name], new_rows_from)
    return targets, stored


def stored_weights(
    model: CausalLM,
    folder: str | Path,
    family: Family | None = None,
    new_rows_from: int | None = None,
    without: str | None = None,
) -> dict[str, StoredTensor]:
    """{parameter of `model`: its tensor in `folder`, not read yet}; the arguments and errors are those of `load_weights`."""
    return _matched(model, Path(folder), family, new_rows_from, without)[1]


def _is_mapped(target: _Target, stored: StoredTensor, device: torch.device) -> bool:
    """Whether the mapped file can serve as the parameter's memory."""
    if target.is_quantized or device.type != "cpu" or not target.parameter.is_meta or not target.part.is_whole:
        return False
    return stored.dtype == target.parameter.dtype and stored.shape == target.shape and stored.is_aligned


def _replace(target: _Target, values: Tensor) -> None:
    setattr(target.module, target.leaf, nn.Parameter(values, requires_grad=target.parameter.requires_grad))


@torch.no_grad()
def _load_one(target: _Target, stored: StoredTensor, device: torch.device) -> None:
    if target.is_quantized:
        _quantize(target, stored, device)
        return
    if target.parameter.is_meta:
        _replace(target, torch.empty(target.part.local_shape, dtype=target.parameter.dtype, device=device))
    local = local_tensor(target.parameter)
    if stored.shape == target.shape:
        stored.read_into(local, target.part)
        return
    old_rows = stored.shape[0]
    done = 0
    for start, stop in target.part.rows:  # rows beyond those in the file start at the mean of the old ones
        known = Part(tuple(stored.shape), ((start, max(start, min(stop, old_rows))),), target.part.columns)
        count = known.local_shape[0]
        stored.read_into(local[done : done + count], known)
        if count < stop - start:
            mean = Part(target.part.shape, ((0, 1),), target.part.columns).take(stored.tensor().float().mean(0)[None])
            local[done + count : done + stop - start] = mean.to(local)
        done += stop - start


def _quantize(target: _Target, stored: StoredTensor, device: torch.device) -> None:
    """Read the rows in which this rank's blocks lie, and quantize those blocks alone."""
    layer, part = target.module, target.part
    assert isinstance(layer, NF4Linear)
    if layer.weight_nf4.is_meta:
        layer.load_weight(target.leaf, stored.tensor(), device)
        return
    columns = part.local_shape[1]
    first, last = (BLOCK_SIZE * block for block in shard_rows(layer.weight_nf4))
    rows = part.local_rows(first // columns, -(-last // columns))
    dense = torch.empty(rows.local_shape, dtype=stored.dtype)
    stored.read_into(dense, rows)
    skipped = first % columns
    own = dense.flatten()[skipped : skipped + last - first]
    local = local_tensor(layer.weight_nf4)
    local.copy_(quantize_nf4(own.to(local.device)))


def _check_names(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    for names, what in ((missing, "lack"), (unexpected, "also hold")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"the weights in {folder} {what} {', '.join(names[:3])}{more}, going by its config.json: "
                "the files don't belong together; download the model again, or mend config.json"
            )


def _check_shape(name: str, target: _Target, stored: StoredTensor, new_rows_from: int | None) -> None:
    if stored.shape == target.shape:
        return
    if target.may_grow and new_rows_from is not None and new_rows_from < target.shape[0]:
        if stored.shape == (new_rows_from, *target.shape[1:]):
            return
    ours = "" if name == stored.name else f" for {name}"
    raise UserError(
        f"{stored.path}: the tensor {stored.name} has the shape {tuple(stored.shape)}, but the model, going by its config.json, "
        f"{tuple(target.shape)}{ours}: the files don't belong together; download the model again, or mend config.json"
    )
