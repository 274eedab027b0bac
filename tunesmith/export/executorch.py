"""An ExecuTorch program (.pte), for phones and other small machines: what ExecuTorch's own runner of language models takes.

The runner finds what it must know in constant methods of the program (get_max_seq_len, get_eos_ids, ...), and calls `forward` with
tokens and the position of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tunesmith.checkpoint.check import TOLERANCES
from tunesmith.configs.export import Export, ProgramFile
from tunesmith.errors import require
from tunesmith.export.decoding import Room, compare, end_ids, find_room, length_notes, load_merged, write_beside
from tunesmith.export.dynamic_int4 import use_torchao
from tunesmith.export.quiet import quietly
from tunesmith.export.result import Exported
from tunesmith.export.source import Source
from tunesmith.export.torch_export import described, trace

FILE = "model.pte"


def export_executorch(source: Source, folder: Path, config: Export) -> Exported:
    """Write model.pte into `folder`; ExecuTorch's runtime reads it back and runs it."""
    is_quantized = bool(source.hf_config.get("quantization_config"))  # to 8da4w, or `check_exportable` refused it
    with quietly():
        require("executorch.exir", "executorch", "`format: executorch`")
    room, options = find_room(source, config), config.program or ProgramFile()
    model, notes = load_merged(source, config, room), length_notes(source, room)
    with quietly():
        if is_quantized:
            notes += scale_notes(use_torchao(model))
        traced = trace(model, room, options.all_logits, plain_arithmetic=True)
        partitioners = [] if options.backend == "portable" else [xnnpack(model.config.hidden_act)]
        lower(traced, partitioners, constants(source, room), folder / FILE)
        # An input half-way between two levels may be rounded either way.
        tolerance = config.tolerance or (TOLERANCES[torch.bfloat16] if is_quantized else None)
        check = compare(model, load(folder / FILE), room, "executorch.runtime", tolerance)
    write_beside(source, folder, **described(model, room, FILE, options.all_logits))
    return Exported([check], notes)


def scale_notes(moved: float) -> list[str]:
    """What to tell about scales that XNNPACK rounds."""
    if not moved:
        return []
    return [
        f"XNNPACK holds the scales of 4-bit weights in bfloat16: they moved by up to {moved:.1e} of their size, as in the model compared with"
    ]


def constants(source: Source, room: Room) -> dict[str, Any]:
    """What the runner asks a program."""
    bos_id, stop_ids = end_ids(source)
    found = {
        "get_bos_id": bos_id,
        "get_eos_ids": stop_ids or None,
        "get_vocab_size": source.config.vocab_size,
        "get_n_layers": source.config.num_hidden_layers,
        "get_max_seq_len": room.max_chunk,
        "get_max_context_len": room.max_length,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": room.max_chunk > 1,
    }
    return {name: value for name, value in found.items() if value is not None}


def xnnpack(hidden_act: str) -> Any:
    """What gives XNNPACK its share of a program."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import GeluConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    # Its gelu is the exact one, whatever the program asks for (ExecuTorch 1.5): logits of Gemma would be wrong by 2e-4.
    unfit = (GeluConfig,) if hidden_act.startswith("gelu_") else ()
    return XnnpackPartitioner(configs=[one for one in ALL_PARTITIONER_CONFIGS if one not in unfit])


def lower(traced: ExportedProgram, partitioners: list[Any], constant_methods: dict[str, Any], path: Path) -> None:
    """Write the program for ExecuTorch's runtime."""
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    with torch.no_grad():
        edge = to_edge_transform_and_lower(traced, partitioner=partitioners, constant_methods=constant_methods)
        # Without this pass each call would copy the whole cache, twice.
        program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    with path.open("wb") as file:
        program.write_to_file(file)


def load(path: Path) -> Any:
    """A call of the program in a file."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    assert method is not None

    def call(tokens: Tensor, position: int) -> Tensor:
        return method.execute([tokens, torch.tensor([position])])[0].flatten(0, -2).clone()

    return call
