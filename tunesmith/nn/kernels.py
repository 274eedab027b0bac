"""Who sees whom as masks, and the kernels that compute attention with them.

B batch, T tokens, H query heads, G key-value heads, K head size, S keys.
"""

from __future__ import annotations

from functools import cache as cached

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(
    length: int, window: int | None, device: torch.device, documents: Tensor | None = None
) -> Tensor | None:
    """(1 or B, 1, T, T) bool, True where seen; None where plain causality says it all. documents: (B, T), -1 for padding."""
    if documents is None and (window is None or window >= length):
        return None
    order = torch.arange(length, device=device)
    distance = order[:, None] - order
    seen = (distance >= 0) & (distance < (window or length))
    if documents is None:
        return seen[None, None]
    # Padding sees padding: a row of the mask without any True would give nan.
    return seen & (documents[:, None, :, None] == documents[:, None, None, :])


def chunk_mask(
    chunk: tuple[int, int], window: int | None, device: torch.device, documents: Tensor | None = None
) -> Tensor:
    """(1 or B, 1, chunk, end of the chunk) bool: what the tokens of `chunk` see of the row up to its end. documents: (B, T) of the row."""
    start, stop = chunk
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(stop, device=device)
    seen = ((distance >= 0) & (distance < (window or stop)))[None, None]
    if documents is None:
        return seen
    return seen & (documents[:, None, start:stop, None] == documents[:, None, None, :stop])


def is_half(dtype: torch.dtype) -> bool:
    """Whether a number takes 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None):
    """q (B, H, T, K), k and v (B, G, S, K), mask (1 or B, 1, T, S) -> (B, H, T, K)."""
    grouped, dtype = q.shape[1] != k.shape[1], v.dtype
    if softcap is not None:
        return softcapped(q, k, v, mask, causal, scale, softcap)
    if q.device.type == "cpu" and is_half(v.dtype) and not torch.is_grad_enabled():
        # Three times as fast for decoding: see _DocumentAttention.
        q, k, v = q.float(), k.float(), v.float()
    if grouped and mask is not None and q.device.type != "cpu":
        # The fused kernels that take a mask take no groups there: repeating keys is cheaper than losing them.
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.to(dtype)


def softcapped(q, k, v, mask: Tensor | None, causal: bool, scale: float, softcap: float) -> Tensor:
    """Attention with scores squeezed by a tanh, which no fused kernel offers. Groups of queries share a key without copies."""
    groups = q.unflatten(1, (k.shape[1], -1))
    scores = softcap * torch.tanh(groups @ k[:, :, None].transpose(-1, -2) * (scale / softcap))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


# --- FlexAttention (CUDA): skips what documents and windows hide, and knows the soft cap ------------


def block_mask(
    length: int, window: int | None, documents: Tensor | None, batch_size: int, device: torch.device, start: int = 0
):
    """FlexAttention's mask of the same sight as causal_mask, for the tokens from `start` to `length`."""

    def seen(b, h, query, key):
        query = query + start
        allowed = (query >= key) & (query - key < (window or length))
        return allowed if documents is None else allowed & (documents[b, query] == documents[b, key])

    batch = None if documents is None else batch_size
    build = _compiled_mask_builder() if device.type != "cpu" else _plain_mask_builder()
    return build(seen, batch, None, length - start, length, device=device)


def flex(q: Tensor, k: Tensor, v: Tensor, mask, scale: float, softcap: float | None) -> Tensor:
    kernel = _compiled_flex() if q.device.type != "cpu" else _plain_flex()
    grouped = q.shape[1] != k.shape[1]
    return kernel(q, k, v, _squeezer(softcap) if softcap is not None else None, mask, scale, grouped)


@cached
def _squeezer(softcap: float):
    """One function for each soft cap: a new one for each call would be compiled anew."""

    def squeeze(score, b, h, query, key):
        return softcap * torch.tanh(score / softcap)

    return squeeze


@cached
def _plain_mask_builder():
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask


@cached
def _compiled_mask_builder():
    """Uncompiled, it holds a mask of queries x keys before it looks at blocks: 16 GiB and more at 131,072 tokens."""
    return torch.compile(_plain_mask_builder())


@cached
def _plain_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cached
def _compiled_flex():
    return torch.compile(_plain_flex())
