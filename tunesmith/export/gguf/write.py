"""A model as one GGUF file: metadata, then the tensors one by one, an adapter merged on the way; read back by the `gguf` package and llama.cpp."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.hf import explain_full_disk, outgoing_weights
from tunesmith.checkpoint.tensor_files import Outgoing
from tunesmith.configs.export import Export, GGUFFile
from tunesmith.configs.shared import TokenizerConfig
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import require
from tunesmith.export.gguf import llama_cpp
from tunesmith.export.gguf.architecture import Architecture, add_rope, add_shape, context_length, find_architecture
from tunesmith.export.gguf.tensors import (
    TOLERANCES,
    Placed,
    differences,
    place,
    read_file,
    rounded,
    stored_shape,
    type_of,
)
from tunesmith.export.gguf.tokenizer import Vocabulary, add_tokenizer, read_vocabulary
from tunesmith.export.result import Check, Exported
from tunesmith.export.source import Source


@dataclass(frozen=True)
class Plan:
    """All that is known of the file before weights are read."""

    architecture: Architecture
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    type: str


def export_gguf(source: Source, folder: Path, config: Export) -> Exported:
    """Write the model into one file in `folder`, one tensor in memory at a time.

    Read back, each tensor is made anew and compared; where llama.cpp's binding is installed, its tokens and logits are compared, too.
    """
    require("gguf", "gguf", "`format: gguf`")
    settings = config.gguf or GGUFFile()
    plan = make_plan(source, settings.type)
    model = source.stream(config.device)
    weights = outgoing_weights(model)
    head_is_own = "lm_head.weight" in weights
    find_architecture(source.family.name, source.config, head_is_own)  # an adapter may have untied the head
    if plan.architecture.head == "own" and not head_is_own:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    path = folder / f"{file_stem(source.name)}-{settings.type.upper()}.gguf"
    placed = list(place({name: tuple(one.shape) for name, one in weights.items()}, plan.architecture, source.config))
    write_file(path, source, plan, placed, weights)

    stored = read_file(path)
    made = ((one, weights[one.name].make) for one in placed)
    checks = [
        Check(f"the gguf package ({kind})", "weights", difference, config.tolerance or TOLERANCES[kind])
        for kind, difference in differences(made, stored).items()
    ]
    context, _ = context_length(plan.architecture, source.config)
    more, notes = llama_cpp.check_file(
        path, source, plan.tokenizer, placed, stored, settings.type, context, config.tolerance
    )
    return Exported(checks + more, [*_notes(source, plan, placed), *notes])


def make_plan(source: Source, type: str) -> Plan:
    """Raises UserError for what GGUF has no place for."""
    source.must_speak("GGUF")
    architecture = find_architecture(source.family.name, source.config, not source.config.tie_word_embeddings)
    tokenizer = find_tokenizer(TokenizerConfig(), source.tokenizer, source.family.chat_templates)
    return Plan(architecture, tokenizer, read_vocabulary(tokenizer, source.config.vocab_size), type)


def write_file(path: Path, source: Source, plan: Plan, placed: list[Placed], weights: dict[str, Outgoing]) -> None:
    """Raises UserError for a full disk, and where the architecture lacks these rotary positions."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, plan.architecture.name)
    writer.add_type("model")
    writer.add_name(file_stem(source.name))
    writer.add_file_type(_file_type(plan.type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, plan.architecture, source.config)
    factors = add_rope(writer, plan.architecture, source.config)
    add_tokenizer(writer, plan.tokenizer, plan.vocabulary)
    extra = {name: np.array(values, dtype=np.float32) for name, values in factors.items()}
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for one in placed:
        kind = type_of(one, plan.type)
        shape, dtype = stored_shape(one.shape, kind)
        writer.add_tensor_info(one.gguf, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)
    with explain_full_disk(path.parent):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in extra.values():
                writer.write_tensor_data(values)
            for one in placed:
                writer.write_tensor_data(
                    rounded(one.there(weights[one.name].make().cpu().float()), type_of(one, plan.type))
                )
        finally:
            writer.close()


def file_stem(name: str) -> str:
    """What to call the file: the last part of the model's name."""
    return re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if Path(name).exists() else name.rpartition("/")[2])


def _file_type(type: str) -> Any:
    from gguf import LlamaFileType

    return LlamaFileType.ALL_F32 if type == "f32" else LlamaFileType[f"MOSTLY_{type.upper()}"]


def _notes(source: Source, plan: Plan, placed: list[Placed]) -> list[str]:
    notes = []
    length, reason = context_length(plan.architecture, source.config)
    if reason:
        notes.append(
            f"the file says that the context is {length} tokens: {reason}, so that beyond them it would compute something else"
        )
    if source.config.rope.kind == "longrope":
        original = source.config.rope.original_max_position_embeddings
        notes.append(
            f"llama.cpp stretches the positions of short texts, too, as soon as it is run with a context above {original} tokens"
        )
    odd = [
        one.gguf for one in placed if len(one.shape) > 1 and type_of(one, plan.type).name not in (plan.type.upper(),)
    ]
    if odd:
        notes.append(
            f"{len(odd)} matrices are in f16, their rows are no whole blocks of {plan.type}: {', '.join(odd[:3])}{' …' * (len(odd) > 3)}"
        )
    return notes
