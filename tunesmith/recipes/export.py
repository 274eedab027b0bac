"""Export: a model for other programs. An adapter is merged into its base on the way, except where the format is an adapter.

    tune run export model=run/checkpoints/step-00000100 output_dir=merged       a repository in safetensors
    tune run export model=Qwen/Qwen3-0.6B dtype=fp32 max_shard_size=500MB output_dir=out
    tune run export model=outputs/checkpoint/step-1000 output_dir=llama           from a checkpoint of torchtitan (DCP)
    tune run export model=run/checkpoints/step-00000100 format=gguf gguf.type=q8_0 output_dir=out

What is written is read back by its consumer and compared with the model; above the tolerance nothing is left behind.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.formats import find_writer
from tunesmith.export.source import find_source
from tunesmith.training.convert import replacing
from tunesmith.training.preflight import check_exportable


def main(config: Export) -> None:
    output = Path(config.output_dir).expanduser()
    check_output(output)
    source = find_source(config.model, config.base)
    check_exportable(config, source.hf_config, source.family, source.config, source.base is not None)
    write = find_writer(config.format)
    with replacing(output, only_empty=True) as folder:
        exported = write(source, folder, config)
    print("\n".join(exported.lines(output)))


def check_output(output: Path) -> None:
    """Raise UserError where there is something already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir {output} is not empty: choose another, or remove it first")
