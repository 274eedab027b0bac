"""A model as one GGUF file: metadata, then the tensors one by one, an adapter merged on the way; read back by the `gguf` package and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith.checkpoint.hf import outgoing_weights
from tunesmith.configs.export import Export, GGUFFile
from tunesmith.configs.shared import TokenizerConfig
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import require
from tunesmith.export.gguf import consumer
from tunesmith.export.gguf.architecture import Architecture, add_rope, add_shape, context_length, find_architecture
from tunesmith.export.gguf.lora import export_lora
from tunesmith.export.gguf.tensors import (
    TOLERANCES,
    Placed,
    differences,
    place,
    read_file,
    type_of,
    write_tensors,
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
    if settings.lora:
        return export_lora(source, folder, config)
    plan = make_plan(source, settings.type)
    model = source.stream(config.device)
    weights = outgoing_weights(model)
    head_is_own = "lm_head.weight" in weights
    find_architecture(source.family.name, source.config, head_is_own)  # an adapter may have untied the head
    if plan.architecture.head == "own" and not head_is_own:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    path = folder / f"{source.stem}-{settings.type.upper()}.gguf"
    placed = list(place({name: tuple(one.shape) for name, one in weights.items()}, plan.architecture, source.config))
    made = [(one, weights[one.name].make) for one in placed]
    write_file(path, source, plan, made)

    stored = read_file(path)
    checks = [
        Check(f"the gguf package ({kind})", "weights", difference, config.tolerance or TOLERANCES[kind])
        for kind, difference in differences(made, stored).items()
    ]
    context, _ = context_length(plan.architecture, source.config)
    more, notes = consumer.check_file(
        path, source, plan.tokenizer, placed, stored, settings.type, context, config.tolerance
    )
    return Exported(checks + more, [*_notes(source, plan, placed), *notes])


def make_plan(source: Source, type: str) -> Plan:
    """Raises UserError for what GGUF has no place for."""
    architecture = find_architecture(source.family.name, source.config, not source.config.tie_word_embeddings)
    tokenizer = find_tokenizer(TokenizerConfig(), source.tokenizer, source.family.chat_templates)
    return Plan(architecture, tokenizer, read_vocabulary(tokenizer, source.config.vocab_size), type)


def write_file(path: Path, source: Source, plan: Plan, made: list[tuple[Placed, Callable[[], Tensor]]]) -> None:
    """Raises UserError for a full disk, and where the architecture lacks these rotary positions."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture.name)
    writer.add_type("model")
    writer.add_name(source.stem)
    writer.add_file_type(_file_type(plan.type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, plan.architecture, source.config)
    factors = add_rope(writer, plan.architecture, source.config)
    add_tokenizer(writer, plan.tokenizer, plan.vocabulary)
    write_tensors(writer, path, made, plan.type, factors)


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
    if plan.tokenizer.eos_id is None:
        notes.append(
            "the tokenizer has no token that ends a text, and llama.cpp takes one by its number: set `eos_token` in tokenizer_config.json"
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
