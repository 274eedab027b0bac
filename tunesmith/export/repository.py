"""A model repository in safetensors, which transformers, vLLM and tunesmith load: an adapter merged, another number type, other shards."""

from __future__ import annotations

import re
from pathlib import Path

from tunesmith import hub
from tunesmith.checkpoint.check import TOLERANCES, logits_from_files, probe_logits
from tunesmith.checkpoint.hf import copy_files, verify, write_repository
from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.result import Check, Exported
from tunesmith.export.source import Source
from tunesmith.training.dtypes import DTYPES


def export_repository(source: Source, folder: Path, config: Export) -> Exported:
    """Write the model into `folder`, one tensor in memory at a time; read it back module by module and compare the logits."""
    shard_size = parse_size(config.max_shard_size or "5GB")
    model = source.stream(config.device)
    dtype = DTYPES[config.dtype] if config.dtype else None
    digests = write_repository(model, folder, dtype=dtype, max_shard_size=shard_size, source=source.weights)
    digests |= copy_files(source.tokenizer, folder, hub.TOKENIZER_FILES)
    verify(folder, digests)
    types = (dtype or model.model.weight_dtype, model.model.compute_dtype)
    tolerance = config.tolerance or max(TOLERANCES.get(one, 1e-4) for one in types)
    ours = probe_logits(model)
    difference = (ours - logits_from_files(folder, model.model.device)).abs().max() / ours.abs().max().clamp_min(1e-30)
    return Exported([Check("tunesmith, from the files alone", "logits", difference.item(), tolerance)])


def parse_size(text: str) -> float:
    """Bytes of a size such as 500MB, 5GB or (powers of 1024) 5GiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"`max_shard_size` must be a size such as 500MB or 5GB, got {text!r}")
    return float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
