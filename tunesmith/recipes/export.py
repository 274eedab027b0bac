"""Export: a model for other programs. An adapter is merged into its base on the way, except where the format is an adapter.

    tune run export model=run/checkpoints/step-00000100 output_dir=merged       a repository in safetensors
    tune run export model=Qwen/Qwen3-0.6B dtype=fp32 max_shard_size=500MB output_dir=out
    tune run export model=outputs/checkpoint/step-1000 output_dir=llama           from a checkpoint of torchtitan (DCP)
    tune run export model=run/checkpoints/step-00000100 format=gguf gguf.type=q8_0 output_dir=out

What is written is read back by its consumer and compared with the model; above the tolerance nothing is left behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.formats import find_writer
from tunesmith.export.source import find_source


def main(config: Export) -> None:
    output = Path(config.output_dir)
    check_output(output)
    write = find_writer(config.format)
    source = find_source(config.model, config.base)
    with all_or_nothing(output) as folder:
        exported = write(source, folder, config)
    print("\n".join(exported.lines(output)))


def check_output(output: Path) -> None:
    """Raise UserError where there is something already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output_dir {output} is not empty: choose another, or remove it first")


@contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A hidden folder that is renamed to `output` at the end, and removed if there is an error before."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
