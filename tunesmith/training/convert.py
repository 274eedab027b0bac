"""A checkpoint's files made into a quantized repository, on the host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunesmith import hub
from tunesmith.checkpoint.check import check_rounded_logits, logits_from_files, probe_logits, rounded_tolerance
from tunesmith.checkpoint.hf import MAX_SHARD_SIZE, copy_files, explain_full_disk, verify
from tunesmith.checkpoint.load import read_model_config, stated_dtype
from tunesmith.checkpoint.quantized import Quantized, Written, write_quantized
from tunesmith.configs.shared import TrainSettings
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.fake_quantize import set_rounding
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.mesh import Ranks
from tunesmith.training.build import scheme_of
from tunesmith.training.dtypes import DTYPES
from tunesmith.training.load import stream_model
from tunesmith.training.progress import format_bytes
from tunesmith.training.source import base_of


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
    One tensor is held at a time, the rest is read as it is needed. What lay at `target` is replaced when all is written. Raises
    UserError for a folder that is no model, or is quantized.
    """
    origin = origin_of(folder, base)
    dtype = dtype or stated_dtype(read_model_config(origin)[0])
    # The base is rounded before the adapter is merged into it, as it was in training.
    model = stream_model(folder, dtype=dtype if origin != folder else None, base=base)
    with replacing(target) as partial:
        return write_model(model, partial, scheme, dtype, origin, hub.tokenizer_home(folder, origin), max_shard_size)


def quantize_trained(
    model: CausalLM, optimizer: Any, config: TrainSettings, checkpoint: Path, base: Path | None, ranks: Ranks
) -> str:
    """Write the model of a run's checkpoint, quantized as it was trained for, to quantized/ and compare it with the one in memory;
    what to say of it. base: of an adapter."""
    assert config.qat is not None
    scheme, target, dtype = scheme_of(config.qat), checkpoint.parents[1] / "quantized", DTYPES[config.dtype]
    set_rounding(model, True)
    with optimizer.precision():  # levels are those of the numbers that are computed with
        ours = probe_logits(model)

    def write() -> str:
        written = quantize_repository(checkpoint, target, scheme, dtype, base)
        tolerance = max(rounded_tolerance(scheme, dtype), 1e-2)  # weights that ranks merge may jump, too
        theirs = logits_from_files(target, model.model.device)
        difference = check_rounded_logits(ours, theirs, tolerance, str(target))
        return (
            f"quantized ({scheme}): {target}, weights of {format_bytes(written.size)} instead of {format_bytes(written.plain_size)} in {config.dtype}; "
            f"read back, its logits differ from the trained model's by {difference:.1e} of their size"
        )

    return ranks.from_main(write)


@contextmanager
def replacing(target: Path, only_empty: bool = False) -> Iterator[Path]:
    """A hidden folder that takes the place of `target` at the end, and is removed if there is an error before.

    only_empty: raise UserError, instead of removing it, for what lies in `target` by then.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_full_disk(target):
            partial.mkdir(parents=True)
        yield partial
        if only_empty and target.exists():
            with explain_full_disk(target):
                target.rmdir()
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_model(
    model: CausalLM,
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype,
    source: Path,
    tokenizer: Path,
    max_shard_size: float = MAX_SHARD_SIZE,
    chosen: Mapping[str, Quantized] | None = None,
) -> Written:
    """Write `model` into `folder`, quantized, with generation_config.json of the folder `source` and the files of the tokenizer in another.

    chosen: {layer: levels and scales}; others are rounded to nearest. What was written is read again and its checksums compared.
    """
    written = write_quantized(model, folder, scheme, dtype, max_shard_size, chosen)
    beside = copy_files(tokenizer, folder, hub.TOKENIZER_FILES) | copy_files(
        source, folder, ("generation_config.json",)
    )
    written = replace(written, digests=written.digests | beside)
    verify(folder, written.digests)
    return written


def origin_of(folder: Path, base: str | Path | None = None) -> Path:
    """The folder with the weights: that of the base, where `folder` holds an adapter."""
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return base_of(folder, base) if is_adapter else folder
