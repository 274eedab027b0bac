"""Options of `tune run export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.configs.shared import RunSettings


@dataclass(kw_only=True)
class Export(RunSettings):
    """Export: merge an adapter into its base, or change dtype and shards."""

    model: str
    """Folder or Hub id of a model or of a PEFT adapter."""
    base: str | None = None
    """Base model of the adapter; default: the one its adapter_config.json names."""
    output_dir: str
    """Where the model goes; must be empty or absent."""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """Number type of the written weights; default: the source's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as 500MB or 5GB."""
    tolerance: float | None = None
    """Largest allowed difference of the logits read back, relative to their size; default: by dtype."""
