"""Programs: a decoder whose keys and values are its own state, in a form that torch.export traces.

The maths is the model's: its layers, projections, norms and rotations are called as they are. Only who keeps the keys and
values is changed, so every family traces.

B batch (1), T tokens, H query heads, G key-value heads, K head size, S slots of the cache, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import DecoderConfig
from tunesmith.nn.attention import Attention, Sight

Attend = Callable[[Attention, Tensor, Tensor, Tensor, Any], Tensor]
"""Takes a layer's attention, queries (B, T, H, K), keys and values (B, G, S, K) and a mask; gives the layer's output (B, T, D)."""


@dataclass
class Step(Sight):
    """Who sees whom in one call of a program."""

    positions: Any = None
    """(T,) of the tokens at hand, and the slots in which their keys and values go."""


class StaticAttention(nn.Module):
    """A layer's attention with a cache of fixed size for one sequence, which is part of the program's state."""

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self, attention: Attention, max_length: int, dtype: torch.dtype, attend: Attend):
        super().__init__()
        self.attention, self.attend = attention, attend
        shape = (1, attention.num_key_value_heads, max_length, attention.head_dim)
        self.register_buffer("key_cache", torch.zeros(shape, dtype=dtype))
        self.register_buffer("value_cache", torch.zeros(shape, dtype=dtype))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """(1, T, D) -> (1, T, D); keys and values are written to their slots first."""
        q, k, v = self.attention.qkv(x, step)
        for cache, new in ((self.key_cache, k), (self.value_cache, v)):
            cache.index_copy_(2, step.positions, new.transpose(1, 2))
        return self.attend(self.attention, q, self.key_cache, self.value_cache, step.masks[self.attention.window])


class Program(nn.Module):
    """Token ids (1, T) and the position (1,) of the first of them -> logits (1, V) after the last, or (1, T, V) after each.

    Keys and values of earlier calls are remembered, at most `max_length` tokens of one sequence; a sequence is begun anew
    by a call at position 0. The weights are the model's, which is left as it is.
    """

    def __init__(self, model: CausalLM, max_length: int, all_logits: bool = False, plain_arithmetic: bool = False):
        """plain_arithmetic: attention without PyTorch's own operator, for consumers that take it apart."""
        super().__init__()
        self.all_logits, self.plain_arithmetic = all_logits, plain_arithmetic
        self.share = model.config.num_attention_heads // model.config.num_key_value_heads
        self.decoder, self.head = model.model.stage((), is_first=True, is_last=True), model.head
        self.layers = nn.ModuleList(
            with_attention(layer, StaticAttention(layer.self_attn, max_length, model.model.compute_dtype, self.attend))  # type: ignore[arg-type]
            for layer in model.model.layers.values()
        )
        self.rotations = Rotations(model, max_length)
        self.register_buffer("slots", torch.arange(max_length), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        positions = input_pos + torch.arange(tokens.shape[1], device=tokens.device)
        step = Step(self.masks(positions), self.rotations(positions[None]), positions=positions)
        x = self.decoder.embed(tokens)
        for layer in self.layers:
            x = layer(x, step)
        hidden = self.decoder.norm(x)
        return self.head.logits(hidden if self.all_logits else hidden[:, -1])

    @property
    def attend(self) -> Attend:
        return attend_in_groups if self.plain_arithmetic else attend_slots

    def masks(self, positions: Tensor) -> dict[int | None, Tensor | None]:
        """For each window what tokens at `positions` (T,) see of the slots, as `attend` takes it."""
        seen = seen_slots(positions[None], self.get_buffer("slots"), self.decoder.config)
        if self.plain_arithmetic:
            seen = {window: added(mask, self.share) for window, mask in seen.items()}
        return dict(seen)


def seen_slots(positions: Tensor, slots: Tensor, config: DecoderConfig) -> dict[int | None, Tensor]:
    """For each window of a model a mask (B, 1, T, S): the slots, at positions `slots` (S,), that tokens at `positions` (B, T) see."""
    distance = (positions[..., None] - slots)[:, None]
    windows = dict.fromkeys(config.layer_windows)
    return {w: distance >= 0 if w is None else (distance >= 0) & (distance < w) for w in windows}


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


def attend_slots(attention: Attention, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Queries (B, T, H, K) to keys and values (B, G, S, K), mask (B or 1, 1, T, S) bool -> the layer's output (B, T, D)."""
    if attention.softcap is not None:
        return attend_in_groups(
            attention, q, keys, values, added(mask, attention.num_heads // attention.num_key_value_heads)
        )
    grouped = attention.num_heads != attention.num_key_value_heads
    q = q.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, keys, values, mask, scale=attention.scale, enable_gqa=grouped)
    return attention.o_proj(y.transpose(1, 2).flatten(2))


def attend_in_groups(attention: Attention, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The same in plain arithmetic, for a mask (B or 1, 1, H/G*T, S) of numbers: the heads that share a key are like tokens of one
    head, so none is repeated."""
    groups = q.unflatten(2, (attention.num_key_value_heads, -1)).permute(0, 2, 3, 1, 4)
    scores = groups.flatten(2, 3) @ keys.transpose(-1, -2)
    if attention.softcap is None:
        scores = scores * attention.scale
    else:
        scores = torch.tanh(scores * (attention.scale / attention.softcap)) * attention.softcap
    weights = (scores + mask).softmax(-1, dtype=torch.float32).to(values.dtype)
    y = (weights @ values).unflatten(2, groups.shape[2:4])
    return attention.o_proj(y.permute(0, 3, 1, 2, 4).flatten(2))


def added(mask: Tensor, share: int) -> Tensor:
    """A mask (B or 1, 1, T, S), True where seen, as the numbers that `attend_in_groups` adds for `share` heads a key."""
    return torch.where(mask, 0.0, -torch.inf).repeat(1, 1, share, 1)
