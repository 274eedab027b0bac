"""Models to compute with, from a folder or a Hub id."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith import hub
from tunesmith.checkpoint import adapter as peft
from tunesmith.checkpoint.adapter_config import brings_head
from tunesmith.checkpoint.hf import load_weights, prepare_quantized, read_model_config, stated_dtype
from tunesmith.checkpoint.load import stored_weights
from tunesmith.checkpoint.streamed import stream_weights, weights_here
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM, build
from tunesmith.nn.lora import materialize_adapters
from tunesmith.nn.quantize import quantize_linear_layers
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.device import pick_device
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.tensor import apply_tensor_parallel
from tunesmith.training.dtypes import DTYPES, default_dtype
from tunesmith.training.preflight import spread_quantized, warn_of_another_base
from tunesmith.training.source import base_of

logger = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    quantize_base: bool = False,
    mesh: Mesh | None = None,
) -> CausalLM:
    """A model to compute with, from a folder or a Hub id; the folder of a PEFT adapter brings its base.

    Args:
        path: a folder or Hub id of a model or of a PEFT adapter.
        dtype: such as "bfloat16"; default: the one the checkpoint was saved in.
        device: such as "cuda", or "auto".
        adapter: a PEFT adapter to put on the model.
        base: the adapter's base, where it is not the one that adapter_config.json names.
        quantize_base: hold the matrices in 4-bit NormalFloat.
        mesh: where its axis tp has several ranks, each holds its part of every matrix.

    Returns the module in evaluation mode under Hugging Face's parameter names; its parameters ask for no gradient.
    Raises UserError for a folder that is no model, lacks files, or does not fit.
    """
    found = _construct(path, dtype, adapter, base, quantize_base)
    model, place = found.model, pick_device(str(device))
    if mesh is not None and mesh.size("tp") > 1:
        if model.hf_config.get("quantization_config"):
            raise UserError(spread_quantized(path))
        apply_tensor_parallel(model, model.family.tp_plan, mesh, sequence_parallel=False)
    load_weights(model, found.folder, model.family, device=place, without=found.brought)
    _add_adapter(found, place)
    return model.requires_grad_(False).eval()


def stream_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
) -> CausalLM:
    """As `load_model`, but the weights stay in their files (see `checkpoint.streamed`): for models to be computed with a few times, and written."""
    found = _construct(path, dtype, adapter, base, quantize_base=False)
    model, place = found.model, pick_device(str(device))
    stream_weights(model, stored_weights(model, found.folder, model.family, without=found.brought), place)
    with weights_here(model.model.embed_tokens), weights_here(model.head):  # an adapter may bring a copy of them
        _add_adapter(found, place)
    return model.requires_grad_(False).eval()


@dataclass
class _Constructed:
    """A model on meta, adapters on it, and where its values are."""

    model: CausalLM
    folder: Path
    adapter: Path | None
    brought: str | None
    """What the names of the parameters begin with that the adapter brings whole."""


def _construct(
    path: str | Path,
    dtype: str | torch.dtype | None,
    adapter: str | Path | None,
    base: str | Path | None,
    quantize_base: bool,
) -> _Constructed:
    folder = hub.resolve(str(path))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise UserError(f"{path} is an adapter itself: give its base as the model, or no second adapter")
        adapter, folder = folder, base_of(folder, base)
        path = base or folder
    hf_config, family, decoder_config = read_model_config(folder)
    adapter_folder = hub.resolve(str(adapter), what="adapter") if adapter is not None else None
    if adapter_folder is not None:
        hf_config = peft.adapted_config(adapter_folder, family, hf_config)
    wanted = _dtype(dtype) if dtype is not None else stated_dtype(hf_config)
    with torch.device("meta"), default_dtype(wanted):
        model = build(hf_config, family, decoder_config)
    prepare_quantized(model, folder)
    if content := hf_config.get("quantization_config"):
        takes_adapters = Scheme.of_config(content).type == "nf4"
        if takes_adapters and quantize_base:
            raise UserError(f"{path} is quantized already: leave `quantize_base` out")
        if not takes_adapters and (quantize_base or adapter is not None):
            raise UserError(
                f"{path} is quantized: neither `quantize_base` nor an adapter goes with it; take the model it was made from, or one in NF4"
            )
    if adapter_folder is not None:
        if warning := warn_of_another_base(adapter_folder, str(path)):
            logger.warning("%s", warning)
        peft.apply_adapter(model, adapter_folder, quantize_base="nf4" if quantize_base else None, dtype=torch.float32)
    elif quantize_base:
        quantize_linear_layers(model)
    has_head = adapter_folder is not None and brings_head(adapter_folder)
    return _Constructed(model, folder, adapter_folder, f"{model.head_name}." if has_head else None)


def _add_adapter(found: _Constructed, device: torch.device) -> None:
    """Make on `device` what the base's files don't hold, and read it."""
    found.model.init_buffers(device)
    if found.brought is not None:
        found.model.head.to_empty(device=device)
    if found.adapter is not None:
        materialize_adapters(found.model, device)
        peft.load_adapter(found.model, found.adapter)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"no number type {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
