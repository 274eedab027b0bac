"""A checkpoint's files made into a quantized repository, on the host."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tunesmith import hub
from tunesmith.checkpoint.hf import MAX_SHARD_SIZE, copy_files, verify
from tunesmith.checkpoint.load import read_model_config, stated_dtype
from tunesmith.checkpoint.quantized import Quantized, Written, write_quantized
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.scheme import Scheme
from tunesmith.training.build import base_of, load_model


def quantize_repository(
    folder: Path,
    target: Path,
    scheme: Scheme,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    max_shard_size: float = MAX_SHARD_SIZE,
) -> Written:
    """Quantize the model in `folder`, or the adapter there merged into its base, and write it to `target` for transformers and `load_model`.

    dtype: number type that it is to compute in; default: that of the files. base: of the adapter; default: the one it names.
    One tensor is held at a time, the rest is read as it is needed; of an adapter's base in another number type than `dtype` a whole
    copy is. What lay at `target` is replaced when all is written. Raises UserError for a folder that is no model, or is quantized.
    """
    origin = origin_of(folder, base)
    dtype = dtype or stated_dtype(read_model_config(origin)[0])
    # The base is rounded before the adapter is merged into it, as it was in training.
    model = load_model(folder, dtype=dtype if origin != folder else None, base=base)
    return write_model(model, folder, origin, target, scheme, dtype, max_shard_size)


def write_model(
    model: CausalLM,
    folder: Path,
    origin: Path,
    target: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    max_shard_size: float = MAX_SHARD_SIZE,
    calibrated: Mapping[str, Quantized] | None = None,
    check: Callable[[Path], None] = lambda _: None,
) -> Written:
    """Write `model`, quantized, with the other files of `folder`, where it came from, and of `origin`, its base, to `target`.

    calibrated: {layer: levels and scales}; others are rounded to nearest. check: called with what was written before it gets its name.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = write_quantized(model, partial, scheme, dtype, max_shard_size, calibrated)
        beside = copy_files(tokenizer_folder(folder, origin), partial, hub.TOKENIZER_FILES)
        beside |= copy_files(origin, partial, ("generation_config.json",))
        written = replace(written, digests=written.digests | beside)
        verify(partial, written.digests)
        check(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return written


def origin_of(folder: Path, base: str | Path | None = None) -> Path:
    """The folder with the weights: that of the base, where `folder` holds an adapter."""
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return base_of(folder, base) if is_adapter else folder


def tokenizer_folder(folder: Path, origin: Path) -> Path:
    """Where the tokenizer's files are: an adapter's own, saved with it, are preferred to its base's."""
    has_own = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    return folder if has_own else origin
