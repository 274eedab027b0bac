"""A torch.export program (.pt2): loaded and called with PyTorch alone, from Python, or compiled by AOTInductor.

program = torch.export.load("out/model.pt2").module()
logits = program(torch.tensor([[1, 2, 3]]), torch.tensor([0]))       tokens, and the position of the first
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from tunesmith.configs.export import Export, ProgramFile
from tunesmith.export.decoding import Room, compare, find_room, length_notes, load_merged, write_beside
from tunesmith.export.program import Program
from tunesmith.export.quiet import quietly
from tunesmith.export.result import Exported
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM

FILE = "model.pt2"


def export_torch(source: Source, folder: Path, config: Export) -> Exported:
    """Write model.pt2 into `folder`; torch.export.load reads it back, and it is run."""
    room, options = find_room(source, config), config.program or ProgramFile()
    model = load_merged(source, config, room)
    with quietly():
        torch.export.save(trace(model, room, options.all_logits), folder / FILE)
        program = torch.export.load(folder / FILE).module()

    def call(tokens: Tensor, position: int) -> Tensor:
        return program(tokens, torch.tensor([position])).flatten(0, -2)

    check = compare(model, call, room, "torch.export.load", config.tolerance)
    write_beside(source, folder, **described(model, room, FILE, options.all_logits))
    return Exported([check], length_notes(source, room))


def trace(model: CausalLM, room: Room, all_logits: bool, plain_arithmetic: bool = False) -> ExportedProgram:
    """The program of a model, for calls of 1 to `room.max_chunk` tokens."""
    program = Program(model, room.max_length, all_logits, plain_arithmetic).eval()
    example = torch.zeros(1, min(room.max_chunk, 3), dtype=torch.long)
    tokens = {1: Dim("tokens", min=1, max=room.max_chunk)} if room.max_chunk > 1 else {}
    with torch.no_grad():
        return torch.export.export(program, (example, torch.tensor([0])), dynamic_shapes=(tokens, {}))


def described(model: CausalLM, room: Room, file: str, all_logits: bool) -> dict:
    """What program.json says of a program that keeps its keys and values itself."""
    dtype = str(model.model.compute_dtype).removeprefix("torch.")
    vocabulary, count = model.config.vocab_size, "T" if room.max_chunk > 1 else 1
    return {
        "file": file,
        "method": "forward",
        "inputs": [
            {"name": "tokens", "shape": [1, count], "dtype": "int64"},
            {"name": "input_pos", "shape": [1], "dtype": "int64", "meaning": "position of the first token"},
        ],
        "outputs": [
            {"name": "logits", "shape": [1, count, vocabulary] if all_logits else [1, vocabulary], "dtype": dtype}
        ],
        "keys_and_values": "kept by the program; a call at position 0 begins another sequence",
        "max_length": room.max_length,
        "max_tokens_per_call": room.max_chunk,
    }
