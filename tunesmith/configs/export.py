"""Options of `tune run export`."""

import re
from typing import ClassVar, Literal

from tunesmith.configs._section import section
from tunesmith.configs.shared import RunSettings


@section(kw_only=True)
class Export(RunSettings):
    """Export: merge an adapter into its base, or change dtype and shards."""

    takes_classifiers: ClassVar[bool] = True

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

    def problems(self):
        yield from super().problems()
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?i?B", self.max_shard_size, re.IGNORECASE):
            yield f"`max_shard_size` must be a size such as 500MB or 5GB, got {self.max_shard_size!r}"
        if self.tolerance is not None and self.tolerance <= 0:
            yield f"`tolerance` must be above 0, got {self.tolerance}"
