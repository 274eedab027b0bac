"""An ONNX model that ONNX Runtime runs, with the keys and values of earlier tokens going in and out.

Its inputs and outputs carry the names that Hugging Face's Optimum gives them, and take several sequences, padded at the left or right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tunesmith.configs.export import Export
from tunesmith.errors import require
from tunesmith.export.decoding import Call, compare, find_room, length_notes, load_merged, write_beside
from tunesmith.export.program import Rotations, Step, attend_slots, seen_slots, with_attention
from tunesmith.export.quiet import quietly
from tunesmith.export.result import Exported
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.attention import Attention

FILE = "model.onnx"
LARGEST_FILE = 1 << 30
"""Bytes of weights in it; a protocol buffer holds twice as many, no more, so those of larger models go into model.onnx.data."""


def export_onnx(source: Source, folder: Path, config: Export) -> Exported:
    """Write model.onnx into `folder`; ONNX Runtime reads it back and runs it."""
    with quietly():
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "onnx", "`format: onnx`")
    room = find_room(source, config)
    model = load_merged(source, config, room)
    with quietly():
        write(model, folder / FILE)
        check = compare(model, load(folder / FILE, model), room, "onnxruntime", config.tolerance)
    write_beside(source, folder, **described(model, room.max_length))
    return Exported([check], length_notes(source, room))


class PassedAttention(nn.Module):
    """A layer's attention that is given the keys and values of earlier tokens, and leaves those of all in the step."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, step: PassingStep) -> Tensor:
        q, *new = self.attention.qkv(x, step)
        past = step.past[self.attention.layer]
        keys, values = (torch.cat([old, one.transpose(1, 2)], 2) for old, one in zip(past, new))
        step.present.append((keys, values))
        mask = step.masks[self.attention.window]
        assert mask is not None
        return attend_slots(self.attention, q, keys, values, mask)


class PassingStep(Step):
    past: list[tuple[Tensor, Tensor]]
    """Keys and values (B, G, P, K) of each layer."""
    present: list[tuple[Tensor, Tensor]]
    """The same (B, G, P + T, K) as far as layers have come."""


class PassingProgram(nn.Module):
    """Token ids (B, T), an attention mask (B, P + T), positions (B, T), and for each layer the keys and values (B, G, P, K) of P
    earlier tokens -> logits (B, T, V), and for each layer the keys and values (B, G, P + T, K)."""

    def __init__(self, model: CausalLM, length: int):
        super().__init__()
        self.decoder, self.head = model.model.stage((), is_first=True, is_last=True), model.head
        self.layers = nn.ModuleList(
            with_attention(layer, PassedAttention(layer.self_attn))  # type: ignore[arg-type]
            for layer in model.model.layers.values()
        )
        self.rotations = Rotations(model, length)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list) -> Any:
        step = PassingStep(self.masks(input_ids, attention_mask), self.rotations(position_ids))
        step.past, step.present = past_key_values, []
        x = self.decoder.embed(input_ids)
        for layer in self.layers:
            x = layer(x, step)
        return self.head.logits(self.decoder.norm(x)), step.present

    def masks(self, input_ids: Tensor, attention_mask: Tensor) -> dict[int | None, Tensor | None]:
        """For each window what tokens see: of those in their row before them all that aren't padding; padding sees itself too."""
        slots = torch.arange(attention_mask.shape[1], device=input_ids.device)
        rows = slots[-input_ids.shape[1] :][None]
        real = attention_mask[:, None, None].bool() | (rows[:, None, :, None] == slots)
        return {window: mask & real for window, mask in seen_slots(rows, slots, self.decoder.config).items()}


def write(model: CausalLM, path: Path) -> None:
    """Trace the model and write it, the weights in a file beside it where they are more than a protocol buffer holds."""
    program, layers = PassingProgram(model, model.max_seq_len or 0).eval(), range(model.config.num_hidden_layers)
    batch, tokens, earlier, shape = Dim("batch"), Dim("tokens"), Dim("past"), _past_shape(model, 2, 3)
    past = [tuple(torch.zeros(shape, dtype=model.model.compute_dtype) for _ in range(2)) for _ in layers]
    inputs = (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.ones(2, 4).long(), past)
    cached = {0: batch, 2: earlier}
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: Dim.AUTO}, {0: batch, 1: tokens}, [(cached, cached) for _ in layers])
    with torch.no_grad():
        torch.onnx.export(
            program,
            inputs,
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *_names("past_key_values", model)],
            output_names=["logits", *_names("present", model)],
            external_data=sum(one.nbytes for one in program.state_dict().values()) > LARGEST_FILE,
            verbose=False,
        )


def load(path: Path, model: CausalLM) -> Call:
    """A call of the model in a file, for one sequence."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = _names("past_key_values", model)
    empty = torch.zeros(_past_shape(model, 1, 0), dtype=model.model.compute_dtype).numpy()
    state: dict[str, Any] = {}

    def call(tokens: Tensor, position: int) -> Tensor:
        if position == 0:
            state.update(dict.fromkeys(names, empty))
        end = position + tokens.shape[1]
        given = {
            "input_ids": tokens.numpy(),
            "attention_mask": torch.ones(1, end, dtype=torch.long).numpy(),
            "position_ids": torch.arange(position, end)[None].numpy(),
        }
        logits, *present = session.run(None, {**given, **state})
        state.update(zip(names, present))
        return torch.from_numpy(logits)[0]

    return call


def _names(first: str, model: CausalLM) -> list[str]:
    return [f"{first}.{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in ("key", "value")]


def _past_shape(model: CausalLM, batch: int, length: int) -> tuple[int, int, int, int]:
    return batch, model.config.num_key_value_heads, length, model.config.head_dim


def described(model: CausalLM, max_length: int) -> dict:
    """What program.json says of it."""
    dtype = str(model.model.compute_dtype).removeprefix("torch.")
    past = {"shape": ["B", model.config.num_key_value_heads, "P", model.config.head_dim], "dtype": dtype}
    return {
        "file": FILE,
        "inputs": [
            {"name": "input_ids", "shape": ["B", "T"], "dtype": "int64"},
            {"name": "attention_mask", "shape": ["B", "P + T"], "dtype": "int64", "meaning": "0: padding"},
            {"name": "position_ids", "shape": ["B", "T"], "dtype": "int64"},
            *({"name": name, **past} for name in _names("past_key_values", model)),
        ],
        "outputs": [
            {"name": "logits", "shape": ["B", "T", model.config.vocab_size], "dtype": dtype},
            *(
                {"name": name, **past, "shape": [*past["shape"][:2], "P + T", past["shape"][3]]}
                for name in _names("present", model)
            ),
        ],
        "keys_and_values": "given to a call and returned by it: past_key_values of the next call are this one's present; of the first, P is 0",
        "max_length": max_length,
    }
