"""A PEFT adapter, under the names that peft, vLLM and llama.cpp's converter expect."""

from __future__ import annotations

from pathlib import Path

from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.result import Exported
from tunesmith.export.source import Source


def export_adapter(source: Source, folder: Path, config: Export) -> Exported:
    raise UserError("`format: adapter` is not there yet")
