"""Export: an adapter merged into its base, or a model in another number type, cut into other shards, or from torchtitan's layout.

    tune run export model=run/checkpoints/step-00000100 output_dir=merged       an adapter and the base it names
    tune run export model=Qwen/Qwen3-0.6B dtype=fp32 max_shard_size=500MB output_dir=out
    tune run export model=outputs/checkpoint/step-1000 output_dir=llama           a checkpoint of torchtitan (DCP)

What is written is read back, and its logits compared with those of the model in memory.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tunesmith import hub
from tunesmith.checkpoint.adapter import check_changes_something, read_adapter_config
from tunesmith.checkpoint.hf import check_saved, copy_files, verify, write_repository
from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.nn.lora import adapter_layers
from tunesmith.training.build import DTYPES, load_model


def main(config: Export) -> None:
    output, shard_size = Path(config.output_dir), parse_size(config.max_shard_size)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir {output} is not empty: choose another, or remove it first")
    folder = hub.resolve(config.model)
    base = find_base(folder, config.base)

    # A QLoRA adapter, too, is merged into the base as it was before quantization.
    model = load_model(folder, device=config.device, base=base)
    if base is not None:
        check_changes_something(model)
        print(f"merging {len(adapter_layers(model))} adapter layers of {folder} into {base}")

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        dtype = DTYPES[config.dtype] if config.dtype else None
        digests = write_repository(model, partial, dtype=dtype, max_shard_size=shard_size, source=base or folder)
        digests |= copy_files(tokenizer_folder(folder, base), partial, hub.TOKENIZER_FILES)
        verify(partial, digests)
        difference = check_saved(model, partial, config.tolerance)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in output.iterdir())
    print(
        f"wrote {output}: {len(digests)} files, {size / 1e9:.3g} GB; read back, its logits differ from the model's in memory by {difference:.1e} of the largest"
    )


def find_base(folder: Path, base: str | None) -> Path | None:
    """The folder of the base where `folder` holds an adapter; None where it holds a model."""
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        if base is not None:
            raise UserError(
                f"`base` is for adapters, but {folder} is no adapter (it has no adapter_config.json): leave `base` out"
            )
        return None
    named = base or read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise UserError(f"the adapter in {folder} doesn't name its base: set `base`")
    return hub.resolve(named)


def tokenizer_folder(folder: Path, base: Path | None) -> Path:
    """Where the tokenizer's files come from: an adapter's own, saved with it, are preferred to its base's."""
    has_own = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    return folder if base is None or has_own else base


def parse_size(text: str) -> float:
    """Bytes of a size such as 500MB, 5GB or (powers of 1024) 5GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"`max_shard_size` must be a size such as 500MB or 5GB, got {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
