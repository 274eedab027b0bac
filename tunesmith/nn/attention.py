"""Causal self-attention: the layer, and how it goes about rows, packed documents, shared rows and cached tokens.

B batch, T tokens, H query heads, G key-value heads, K head size, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.nn.cached_attention import attend_cached
from tunesmith.nn.config import DecoderConfig
from tunesmith.nn.kernels import causal_mask, flex, is_half, kernel
from tunesmith.nn.kv_cache import Pass
from tunesmith.nn.linear import Linear
from tunesmith.nn.norm import RMSNorm
from tunesmith.nn.rope import rotate
from tunesmith.nn.sequence_shards import SequenceShards

CosSin = tuple[Tensor, Tensor]


@dataclass
class Sight:
    """Who sees whom in one forward pass: built once, used by every layer.

    A token sees itself and what comes before it in its own document, no further back than the layer's window.
    """

    masks: dict[int | None, Tensor | None]
    """For each window a mask (1 or B, 1, T, T), True where a token is seen; None: plainly causal."""
    cos_sin: dict[bool, CosSin]
    """Cosines and sines (B or 1, T, 1, R), for `rotate`, of layers with the global rotary positions (False) and the local ones (True)."""
    segments: list[tuple[int, bool]] | None = None
    """Set where attention goes document by document (on the CPU): (tokens, is padding) of each, all rows in one line."""
    block_masks: dict[int | None, Any] = field(default_factory=dict)
    """Set where FlexAttention does the work: its masks by window."""
    cached: Pass | None = None
    """Set where tokens come before these that are not at hand: the tokens are one line, and this says what it is made of."""
    shards: SequenceShards | None = None
    """Set where ranks share rows: the tokens at hand are two chunks of a row, each with a mask of its own."""
    chunk_masks: dict[int | None, list[Any]] = field(default_factory=dict)
    """For each window, what each chunk sees of the row up to its own end: a mask, or FlexAttention's."""


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (arXiv 2305.13245), rotary positions and optional norms of q and k."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.window = config.layer_windows[layer]
        self.local = config.local_rope is not None and self.window is not None
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap, self.rope_in_float32 = config.attention_softcap, config.rope_in_float32
        self.add_projections(config)
        self.qk_norm = config.qk_norm
        if config.qk_norm is not None:
            heads = (config.num_attention_heads, config.num_key_value_heads) if config.qk_norm == "full" else (1, 1)
            self.q_norm = RMSNorm(heads[0] * config.head_dim, config.rms_norm_eps, config.norm)
            self.k_norm = RMSNorm(heads[1] * config.head_dim, config.rms_norm_eps, config.norm)

    def add_projections(self, config: DecoderConfig) -> None:
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, T, H*K), keys and values (B, T, G*K)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x, sight)
        if sight.cached is None:
            y = attend(q, k, v, sight, self.window, self.scale, self.softcap)
        else:
            y = attend_cached(q[0], k[0], v[0], sight.cached, self.layer, self.window, self.scale, self.softcap)[None]
        return self.o_proj(y.flatten(2))

    def qkv(self, x: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries (B, T, H, K), keys and values (B, T, G, K), rotated to where they stand."""
        q, k, v = self.project(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        # -1: under tensor parallelism a rank holds some of the heads.
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "per_head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(part, *sight.cos_sin[self.local]) for part in (q, k))
        return q, k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention among the tokens at hand: q (B, T, H, K), k and v (B, T, G, K) -> (B, T, H, K)."""
    if sight.shards is not None:
        return _by_chunk(q, k, v, sight.shards, sight.chunk_masks[window], scale, softcap)
    segments = _rows_as_documents(q, v.dtype, sight, window) if sight.segments is None else sight.segments
    if segments is not None:
        return _by_document(q, k, v, segments, window, scale, softcap)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if window in sight.block_masks:
        return flex(q, k, v, sight.block_masks[window], scale, softcap).transpose(1, 2)
    mask = sight.masks[window]
    return kernel(q, k, v, mask, mask is None, scale, softcap).transpose(1, 2)


def _by_chunk(q, k, v, shards: SequenceShards, masks: list[Any], scale: float, softcap: float | None) -> Tensor:
    """Queries of this rank's chunks, keys and values of the whole row, brought together in one message."""
    k, v = shards.whole(torch.cat([k, v], -1)).chunk(2, -1)
    parts = []
    for query, (_, stop), mask in zip(q.chunk(2, 1), shards.ranges(k.shape[1]), masks):
        query, key, value = (part.transpose(1, 2) for part in (query, k[:, :stop], v[:, :stop]))
        if isinstance(mask, Tensor):
            y = kernel(query, key, value, mask, False, scale, softcap)
        else:
            y = flex(query, key, value, mask, scale, softcap)
        parts.append(y.transpose(1, 2))
    return torch.cat(parts, 1)


def _rows_as_documents(
    q: Tensor, dtype: torch.dtype, sight: Sight, window: int | None
) -> list[tuple[int, bool]] | None:
    """Segments for training on whole rows in half precision on the CPU (see _DocumentAttention); None: use a mask or none."""
    if q.device.type != "cpu" or not is_half(dtype) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    whole = sight.masks.get(window) is None and window not in sight.block_masks
    return [(q.shape[1], False)] * q.shape[0] if whole else None


def _by_document(q, k, v, segments: list[tuple[int, bool]], window: int | None, scale: float, softcap: float | None):
    """One call for each document: work grows with the documents' lengths squared, not with the row's."""
    if softcap is None:
        # Autocast would cast, but doesn't see calls of the kernel itself; norms may have widened q and k.
        flat = (part.flatten(0, 1).to(v.dtype) for part in (q, k, v))
        return _DocumentAttention.apply(*flat, segments, window, scale).view(q.shape)  # type: ignore[union-attr]
    parts = []
    # split, not slices: its gradient is one concatenation.
    split = (part.flatten(0, 1).split([length for length, _ in segments]) for part in (q, k, v))
    for (length, is_padding), query, key, value in zip(segments, *split):
        if is_padding:
            parts.append(torch.zeros_like(query))
            continue
        mask = causal_mask(length, window, q.device)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        parts.append(kernel(query, key, value, mask, mask is None, scale, softcap)[0].transpose(0, 1))
    return torch.cat(parts).view(q.shape)


class _DocumentAttention(torch.autograd.Function):
    """The CPU's flash kernel on each document of a line: q (N, H, K), k and v (N, G, K) -> (N, H, K).

    Half precision is widened for the kernel, document by document: for bf16 the library compiles, and keeps for ever,
    machine code for every length that it meets, which doubles the time and takes a gigabyte within a few steps.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, bool]], window: int | None, scale: float
    ):
        y = q.new_empty(q.shape)
        sums = q.new_empty(q.shape[:2], dtype=_wide(q.dtype))
        for rows, is_padding in _rows(segments):
            if is_padding:
                y[rows], sums[rows] = 0, 0
                continue
            mask = _added_mask(rows, window, q)
            part, part_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_widened(one, rows) for one in (q, k, v)), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            _heads_first(y, rows).copy_(part)
            sums[rows] = part_sums[0].t()
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.segments, ctx.window, ctx.scale = segments, window, scale
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, sums = ctx.saved_tensors
        own = tuple(one.new_empty(one.shape) for one in (q, k, v))
        for rows, is_padding in _rows(ctx.segments):
            if is_padding:
                for one in own:
                    one[rows] = 0
                continue
            mask = _added_mask(rows, ctx.window, q)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_widened(one, rows) for one in (gradient, q, k, v, y)),
                sums[rows].t()[None],
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            for one, part in zip(own, parts):
                _heads_first(one, rows).copy_(part)
        return *own, None, None, None


def _rows(segments: list[tuple[int, bool]]) -> Iterator[tuple[slice, bool]]:
    """Where each document lies in the line, and whether it is padding."""
    start = 0
    for length, is_padding in segments:
        yield slice(start, start + length), is_padding
        start += length


def _heads_first(line: Tensor, rows: slice) -> Tensor:
    """A view (1, H, T, K) of some rows of (N, H, K)."""
    return line[rows].transpose(0, 1)[None]


def _widened(line: Tensor, rows: slice) -> Tensor:
    return _heads_first(line, rows).to(_wide(line.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _added_mask(rows: slice, window: int | None, like: Tensor) -> Tensor | None:
    """causal_mask for those rows as the numbers that the kernel itself adds to the scores."""
    mask = causal_mask(rows.stop - rows.start, window, like.device)
    return None if mask is None else torch.zeros(mask.shape, dtype=_wide(like.dtype)).masked_fill_(~mask, -math.inf)
