"""What all programs have in common: the model that they are made of, how long a sequence they take, what lies beside them, and the
comparison of what they compute with the model.

T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith import hub
from tunesmith.checkpoint.adapter import check_changes_something
from tunesmith.checkpoint.check import TOLERANCES, probe_ids
from tunesmith.checkpoint.hf import copy_files
from tunesmith.configs.export import Export, ProgramFile
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.export.result import Check
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.lora import merge_lora
from tunesmith.training.dtypes import DTYPES
from tunesmith.training.load import load_model
from tunesmith.training.preflight.export import USUAL_LENGTH

USUAL_CHUNK = 512
"""Tokens of a call, where neither the user nor the length of a sequence asks for fewer."""

Call = Callable[[Tensor, int], Tensor]
"""Takes tokens (1, T) and the position of the first; gives the logits (n, V) after the last n of them, in float32."""


@dataclass(frozen=True)
class Room:
    """How much a program has room for, in tokens."""

    max_length: int
    """Of a sequence, prompt and answer."""
    max_chunk: int
    """Of one call."""


def find_room(source: Source, config: Export) -> Room:
    """What the options ask for, as far as they do."""
    options = config.program or ProgramFile()
    length = options.max_length or min(source.config.context_length, USUAL_LENGTH)
    return Room(length, options.max_chunk or min(length, USUAL_CHUNK))


def load_merged(source: Source, config: Export, room: Room) -> CausalLM:
    """The model in the number type that the program will have, an adapter merged, on the CPU, where programs are traced."""
    model = load_model(source.folder, dtype=DTYPES[config.dtype or "fp32"], device="cpu", base=source.base)
    if source.base is not None:
        check_changes_something(model)
        print(f"merging {len(merge_lora(model))} adapter layers of {source.folder} into {source.base}")
    model.init_buffers("cpu", room.max_length)
    return model.requires_grad_(False).eval()


def length_notes(source: Source, room: Room) -> list[str]:
    """What to tell about rotary frequencies that depend on the length of a sequence, which programs can't follow."""
    if not source.config.depends_on_length:
        return []
    return [
        f"the rotary frequencies of {source.name} depend on a sequence's length: the program has those of {room.max_length} tokens throughout"
    ]


def end_ids(source: Source) -> tuple[int | None, list[int]]:
    """The id that begins a text, if there is one, and those that end an answer: of the tokenizer if there is one, else of config.json."""
    if any((source.tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(source.tokenizer)
        return tokenizer.bos_id, sorted(tokenizer.stop_ids)
    ends = source.config.eos_token_id
    return source.config.bos_token_id, sorted([ends] if isinstance(ends, int) else ends or [])


def write_beside(source: Source, folder: Path, **facts: Any) -> None:
    """The tokenizer's files, and program.json: what a program takes and gives, and what else its caller must know."""
    copy_files(source.tokenizer, folder, hub.TOKENIZER_FILES)
    bos_id, stop_ids = end_ids(source)
    common = {"vocab_size": source.config.vocab_size, "bos_id": bos_id, "stop_ids": stop_ids}
    (folder / "program.json").write_text(json.dumps({**facts, **common}, indent=2) + "\n")


@torch.no_grad()
def compare(model: CausalLM, call: Call, room: Room, consumer: str, tolerance: float | None = None) -> Check:
    """Let a program read a prompt in two calls and go on token by token, and compare its logits with the model's for all at once."""
    ids = probe_ids(model.config.vocab_size)[:, : room.max_length]
    ours, difference = model.head.logits(model(ids))[0].float(), 0.0
    for start, stop in _calls(ids.shape[1], room.max_chunk):
        theirs = call(ids[:, start:stop].contiguous(), start).float()
        apart = (theirs - ours[stop - len(theirs) : stop]).abs().max().item()
        difference = max(difference, apart) if apart == apart else apart
        if apart != apart:
            break
    largest = ours.abs().max().clamp_min(1e-30).item()
    allowed = tolerance or TOLERANCES.get(model.model.compute_dtype, 1e-4)
    return Check(consumer, "logits", difference / largest, allowed)


def _calls(length: int, max_chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of each call: half of the tokens, then a quarter, as far as a call takes them, the rest one by one."""
    calls, start = [], 0
    for share in (length // 2, length // 4):
        stop = start + max(min(share, max_chunk), 1)
        if stop <= length:
            calls.append((start, stop))
            start = stop
    return [*calls, *((one, one + 1) for one in range(start, length))]
