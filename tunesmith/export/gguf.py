"""A GGUF file for llama.cpp and what is built on it."""

from __future__ import annotations

from pathlib import Path

from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.result import Exported
from tunesmith.export.source import Source


def export_gguf(source: Source, folder: Path, config: Export) -> Exported:
    raise UserError("`format: gguf` is not there yet")
