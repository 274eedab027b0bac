"""The formats there are, and the function that writes each: (source, folder, config) -> what was written and compared.

Such a function checks what it can before it reads weights, writes into `folder`, which is there and empty, and lets the consumer read it back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.result import Exported
from tunesmith.export.source import Source

WRITERS = {
    "safetensors": "tunesmith.export.repository:export_repository",
    "adapter": "tunesmith.export.adapter:export_adapter",
    "gguf": "tunesmith.export.gguf.write:export_gguf",
    "torch_export": "tunesmith.export.torch_export:export_torch",
    "executorch": "tunesmith.export.executorch:export_executorch",
    "onnx": "tunesmith.export.onnx:export_onnx",
}
"""Format -> its function, imported only when it is asked for: each needs other libraries."""


def find_writer(format: str) -> Callable[[Source, Path, Export], Exported]:
    if format not in WRITERS:
        raise UserError(f"`format: {format}` is not there yet; there are {', '.join(WRITERS)}")
    module, _, name = WRITERS[format].partition(":")
    return getattr(importlib.import_module(module), name)
