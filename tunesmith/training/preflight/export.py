"""Whether a model can be exported as `tune run export` is told. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.configs.export import PROGRAMS, Export
from tunesmith.errors import UserError
from tunesmith.hub import follow_latest, read_json
from tunesmith.nn.scheme import Scheme
from tunesmith.training.preflight.files import ADAPTER_FILE, weights_folder

if TYPE_CHECKING:
    from tunesmith.models.family import DecoderConfig, Family

USUAL_LENGTH = 2048
"""Tokens of a program's sequence, where neither the user nor the model asks for fewer."""
_PACKAGES = {"gguf": ("gguf",), "executorch": ("executorch",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""{format, and extra: what it needs}."""
_NAMES = {"gguf": "GGUF"}
_CLASSIFIERS = {"SEQ_CLS": False, "TOKEN_CLS": True}
"""PEFT's word for what an adapter is for -> whether it scores every token."""


def export_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """What the files of a model tell before any is read whole."""
    if not isinstance(config, Export):
        return
    missing = [name for name in _PACKAGES.get(config.format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        yield f"`format: {config.format}` needs the package {missing[0]}, which is not installed: pip install 'tunesmith[{config.format}]'"
    from tunesmith.models.families import model_config

    try:
        if (folder := weights_folder(config.model, config.base)) is None:
            return
        hf_config, family, shape = model_config(folder)
        own = follow_latest(Path(config.model).expanduser())
        is_adapter = own != folder
        kind = read_json(own / ADAPTER_FILE).get("task_type") if is_adapter else None
        if kind in _CLASSIFIERS:
            hf_config = family.classifier_config(hf_config, family.label_names(hf_config), _CLASSIFIERS[kind])
        check_exportable(config, hf_config, family, shape, is_adapter)
    except UserError as error:
        yield str(error)
        return
    if config.format == "gguf":
        notes.append("whether llama.cpp computes such a model, and knows its tokenizer, is told when the run starts")


def check_exportable(
    config: Export, hf_config: dict[str, Any], family: Family, shape: DecoderConfig, is_adapter: bool
) -> None:
    """Raise UserError for a model that `config.format` has no place for, or can't be written as the options say.

    hf_config: of an adapter, that of its base, with the adapter's head.
    """
    from tunesmith.models.families import check_speaks

    option = "gguf.lora" if config.gguf is not None and config.gguf.lora else f"format: {config.format}"
    if option in ("gguf.lora", "format: adapter") and not is_adapter:
        raise UserError(f"`{option}` writes an adapter, and {config.model} is none: it has no {ADAPTER_FILE}")
    if config.format not in ("safetensors", "adapter"):
        name = _NAMES.get(config.format, config.format)
        check_speaks(family, hf_config, f"{config.model}, to be exported as {name},")
    if config.format != "adapter" and (rounded := hf_config.get("quantization_config")):
        _check_quantized(config, rounded)
    if config.format in PROGRAMS:
        _check_lengths(config, shape)


def _check_quantized(config: Export, rounded: dict[str, Any]) -> None:
    """Raise UserError where what was rounded is not the model any more; ExecuTorch computes with one kind of rounded weights."""
    if config.format != "executorch":
        name = _NAMES.get(config.format, config.format)
        raise UserError(
            f"{config.model} is quantized and can't be exported as {name}: export the model that it was made from"
        )
    if Scheme.of_config(rounded).type != "int8_dynamic_int4":
        raise UserError(
            f"{config.model} is quantized in a way that ExecuTorch doesn't compute with: "
            "export the model that it was made from, or one quantized to 8da4w (int8_dynamic_int4)"
        )
    if config.program is not None and config.program.backend == "portable":
        raise UserError(f"{config.model} is quantized, which XNNPACK alone computes with: leave `program.backend` out")
    if config.dtype not in (None, "fp32"):
        raise UserError(f"{config.model} is quantized, and XNNPACK then computes in fp32: leave `dtype` out")


def _check_lengths(config: Export, shape: DecoderConfig) -> None:
    """Raise UserError for a program with room for more than the model's context."""
    if config.program is None:
        return
    length, chunk, context = config.program.max_length, config.program.max_chunk, shape.context_length
    if length is not None and length > context:
        raise UserError(f"`program.max_length` is {length}, more than the context of {config.model} ({context} tokens)")
    room = length or min(context, USUAL_LENGTH)
    if chunk is not None and chunk > room:
        raise UserError(f"`program.max_chunk` is {chunk}, more than the sequence has room for ({room})")
