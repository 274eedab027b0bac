"""Programs: a decoder whose keys and values are its own state, in a form that torch.export traces.

The maths is the model's: its layers, projections, norms and rotations are called as they are. Only who keeps the keys and
values is changed, so every family traces.

B batch (1), T tokens, H query heads, G key-value heads, K head size, S slots of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.decoder import CausalLM
from tunesmith.nn.attention import Attention, Sight


@dataclass
class Step(Sight):
    """Who sees whom in one call of a program."""

    positions: Any = None
    """(T,) of the tokens at hand, and the slots in which their keys and values go."""


class StaticAttention(nn.Module):
    """A layer's attention with a cache of fixed size for one sequence, which is part of the program's state."""

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self, attention: Attention, max_length: int, dtype: torch.dtype):
        super().__init__()
        self.attention = attention
        shape = (1, attention.num_key_value_heads, max_length, attention.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape, dtype=dtype))
        self.register_buffer("value_cache", torch.zeros(shape, dtype=dtype))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(1, T, D) -> (1, T, D); keys and values are written to their slots first."""
        q, k, v = self.attention.qkv(x, step)
        for cache, new in ((self.key_cache, k), (self.value_cache, v)):
            cache.index_copy_(2, step.positions, new.transpose(1, 2))
        return attend_slots(self.attention, q, self.key_cache, self.value_cache, step.masks[self.attention.window])


class Program(nn.Module):
    """Token ids (1, T) and the position (1,) of the first of them -> logits (1, V) after the last, or (1, T, V) after each.

    Keys and values of earlier calls are remembered, at most `max_length` tokens of one sequence; a sequence is begun anew
    by a call at position 0. The model shares its weights and is left as it is.
    """

    def __init__(self, model: CausalLM, max_length: int, all_logits: bool = False):
        super().__init__()
        self.max_length, self.all_logits = max_length, all_logits
        self.decoder, self.head = model.model, model.head
        dtype = model.model.compute_dtype
        self.layers = nn.ModuleList(
            with_attention(layer, StaticAttention(layer.self_attn, max_length, dtype))  # type: ignore[arg-type]
            for layer in model.model.layers.values()
        )
        self.rotary = Rotations(model, max_length)
        self.register_buffer("slots", torch.arange(max_length), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        positions = input_pos + torch.arange(tokens.shape[1], device=tokens.device)
        step = Step(self.masks(positions), self.rotary(positions[None]), positions=positions)
        x = self.decoder.embed(tokens)
        for layer in self.layers:
            x = layer(x, step)
        hidden = self.decoder.norm(x)
        return self.head.logits(hidden if self.all_logits else hidden[:, -1])

    def masks(self, positions: Tensor) -> dict[int | None, Tensor | None]:
        """For each window (1, 1, T, S) bool: the slots that tokens at `positions` (T,) see."""
        distance = positions[:, None] - self.slots
        seen = {w: distance >= 0 if w is None else (distance >= 0) & (distance < w) for w in self.windows}
        return {window: one[None, None] for window, one in seen.items()}

    @property
    def windows(self) -> list[int | None]:
        return list(dict.fromkeys(self.decoder.config.layer_windows))


class Rotations(nn.Module):
    """Cosines and sines of a model's rotary positions, of kinds that depend on the length those of `length`."""

    def __init__(self, model: CausalLM, length: int):
        super().__init__()
        self.rotary = model.model.rotary
        self.dtype = torch.float32 if model.config.rope_in_float32 else model.model.compute_dtype
        for local, rotary in self.rotary.items():
            frequencies = rotary.frequencies(torch.device("cpu"), length)
            self.register_buffer(self.name(local), frequencies.clone(), persistent=False)

    def forward(self, positions: Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        """positions (B, T) -> what layers with global (False) and local (True) positions rotate by."""
        found = {
            local: rotary.cos_sin(positions, self.get_buffer(self.name(local))) for local, rotary in self.rotary.items()
        }
        return {local: (cos.to(self.dtype), sin.to(self.dtype)) for local, (cos, sin) in found.items()}

    @staticmethod
    def name(local: bool) -> str:
        return "local_frequencies" if local else "frequencies"


def with_attention(layer: nn.Module, attention: nn.Module) -> nn.Module:
    """The layer with another attention, its other parts shared."""
    twin = copy.copy(layer)
    twin._modules = {**layer._modules, "self_attn": attention}
    return twin


def attend_slots(attention: Attention, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Queries (B, T, H, K) to keys and values (B, G, S, K) under a mask (B or 1, 1, T, S) -> the layer's output (B, T, D)."""
    q = q.transpose(1, 2)
    if attention.softcap is None:
        grouped = attention.num_heads != attention.num_key_value_heads
        y = F.scaled_dot_product_attention(q, keys, values, mask, scale=attention.scale, enable_gqa=grouped)
    else:
        y = _squeezed(q, keys, values, mask, attention.scale, attention.softcap)
    return attention.o_proj(y.transpose(1, 2).flatten(2))


def _squeezed(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The same attention with scores squeezed by a tanh: (B, H, T, K)."""
    groups = q.unflatten(1, (keys.shape[1], -1))
    scores = softcap * torch.tanh(groups @ keys[:, :, None].transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values[:, :, None]).flatten(1, 2)
