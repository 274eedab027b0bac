"""Attention to tokens whose keys and values are in blocks.

L tokens of a pass, H query heads, G key-value heads, R query heads for each of these, K head size, B sequences, T new tokens of each,
n blocks of a group, M owners of each, S slots of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.nn.kernels import causal_mask, kernel
from tunesmith.nn.kv_cache import BlockPool, Chunk, Group, Pass, Rows, Steps


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, line: Pass, layer: int, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Keep the new keys and values, then let queries see their sequences: q (L, H, K), k and v (L, G, K) -> (L, H, K)."""
    line.pool.write(layer, k, v, line.slots)
    parts = []
    end = 0
    for part in line.parts:
        if part.start > end:  # padding
            parts.append(q.new_zeros(part.start - end, *q.shape[1:]))
        rows, end = slice(part.start, part.stop), part.stop
        if isinstance(part, Steps):
            parts.append(_steps(q[rows], part, line.pool, layer, window, scale, softcap))
        else:
            parts.append(_chunk(q[rows], k[rows], v[rows], part, line.pool, layer, window, scale, softcap))
    if len(q) > end:
        parts.append(q.new_zeros(len(q) - end, *q.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk(q, k, v, chunk: Chunk, pool: BlockPool, layer: int, window: int | None, scale: float, softcap) -> Tensor:
    """Neighbours of one sequence: q (T, H, K), k and v (T, G, K) -> (T, H, K)."""
    length, is_cpu = len(q), q.device.type == "cpu"
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    if chunk.past == 0 and (not is_cpu or softcap is not None):
        mask = causal_mask(length, window, q.device)
        return kernel(q, k, v, mask, mask is None, scale, softcap)[0].transpose(0, 1)
    keys, values = (k, v) if chunk.past == 0 else pool.of_sequence(layer, chunk.table, chunk.past + length)
    if is_cpu and softcap is None:
        return _in_pieces(q, keys, values, chunk, window, scale)[0].transpose(0, 1)
    y = kernel(q.to(keys.dtype), keys, values, chunk.mask(window), False, scale, softcap)
    return y[0].transpose(0, 1).to(q.dtype)


_PIECE = 64
"""Queries for which keys that none of them sees are left out: the CPU's kernel goes through up to 512 keys whether they are seen or not."""


def _in_pieces(q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, window: int | None, scale: float) -> Tensor:
    """q (1, H, T, K), keys and values (1, G, past + T, K) -> (1, H, T, K)."""
    dtype, mask, parts = q.dtype, chunk.mask(window), []
    q, keys, values = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, keys, values))
    for start in range(0, q.shape[2], _PIECE):
        rows = slice(start, min(start + _PIECE, q.shape[2]))
        seen = slice(0 if window is None else max(0, chunk.past + start - window + 1), chunk.past + rows.stop)
        pieces = q[:, :, rows], keys[:, :, seen], values[:, :, seen]
        parts.append(kernel(*pieces, mask[:, :, rows, seen], False, scale, None))
    return torch.cat(parts, 2).to(dtype)


def _steps(
    q: Tensor, steps: Steps, pool: BlockPool, layer: int, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """A few tokens of each of many sequences: q (L, H, K) -> (L, H, K)."""
    rectangle = q
    if steps.places is not None:
        rectangle = q.new_zeros(steps.rows * steps.tokens, *q.shape[1:]).index_copy_(0, steps.places, q)
    if isinstance(steps.blocks, Rows):
        y = _by_row(rectangle, steps, steps.blocks, pool, layer, window, scale, softcap)
    else:
        y = _by_block(rectangle, steps, steps.blocks, pool, layer, window, scale, softcap)
    return y if steps.places is None else y.index_select(0, steps.places)


def _by_row(
    q: Tensor, steps: Steps, rows: Rows, pool: BlockPool, layer: int, window: int | None, scale: float, softcap
) -> Tensor:
    """T tokens of each of B sequences, whose blocks are copied side by side: q (B * T, H, K) -> (B * T, H, K).

    The heads that share keys, and the tokens, are all queries of one head: no key is repeated.
    """
    keys, values = pool.of_rows(layer, rows)
    queries = q.view(steps.rows, steps.tokens, keys.shape[1], -1, q.shape[-1]).transpose(1, 2)  # (B, G, T, R, K)
    mask = steps.row_mask(rows, window, queries.shape[3], keys.dtype)
    seen = mask if softcap is None else mask == 0
    y = kernel(queries.flatten(2, 3).to(keys.dtype), keys, values, seen, False, scale, softcap)
    return y.view(queries.shape).transpose(1, 2).reshape(q.shape).to(q.dtype)


def _by_block(
    q: Tensor, steps: Steps, groups: list[Group], pool: BlockPool, layer: int, window: int | None, scale: float, softcap
) -> Tensor:
    """T tokens of each of B sequences: q (B * T, H, K) -> (B * T, H, K).

    Blocks are multiplied where they lie: nothing is copied or padded to the longest sequence, and what sequences share is read once.
    Each block's part of the softmax is brought together with its owner's others (as in flash decoding, arXiv 2311.01282).
    """
    keys, values = pool.keys[layer], pool.values[layer]
    batch, tokens, grouped = steps.rows, steps.tokens, keys.shape[1]
    masks = steps.group_masks(groups, window)
    if batch == len(groups) == 1 and softcap is None:
        (group,), (mask,) = groups, masks
        return _alone(q * scale, keys[group.blocks], values[group.blocks], mask)
    queries = (q.view(batch, tokens, grouped, -1, q.shape[-1]).permute(0, 2, 3, 1, 4) * scale).to(keys.dtype)
    shape = queries.shape[1:-1]  # G, R, T
    nobody = queries.new_zeros(1, *queries.shape[1:])
    queries = torch.cat([queries, nobody])
    largest = torch.full((batch + 1, *shape), torch.finfo(torch.float32).min, device=q.device)
    scores = []
    for group, mask in zip(groups, masks):
        owned = queries.index_select(0, group.owners).unflatten(0, (-1, group.owners_per_block)).transpose(1, 2)
        some = owned.flatten(2, 4) @ keys[group.blocks].transpose(-1, -2)  # (n, G, M * R * T, S)
        some = some.float().view(*some.shape[:2], group.owners_per_block, *shape[1:], -1)
        if softcap is not None:
            some = softcap * torch.tanh(some / softcap)
        some += mask
        scores.append(some)
        tops = some.amax(-1).transpose(1, 2).flatten(0, 1)  # (n * M, G, R, T)
        largest.scatter_reduce_(0, group.owners[:, None, None, None].expand_as(tops), tops, "amax")
    total, output = torch.zeros_like(largest), torch.zeros(*largest.shape, q.shape[-1], device=q.device)
    for group, some in zip(groups, scores):
        owned = largest.index_select(0, group.owners).unflatten(0, (-1, group.owners_per_block)).transpose(1, 2)
        some.sub_(owned[..., None]).exp_()
        total.index_add_(0, group.owners, some.sum(-1).transpose(1, 2).flatten(0, 1))
        seen = some.flatten(2, 4).to(values.dtype) @ values[group.blocks]  # (n, G, M * R * T, K)
        seen = seen.float().view(*some.shape[:-1], -1).transpose(1, 2).flatten(0, 1)
        output.index_add_(0, group.owners, seen)
    output = (output / total[..., None].clamp_min_(torch.finfo(torch.float32).tiny))[:batch]
    return output.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1).to(q.dtype)


def _alone(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The same for one sequence, whose softmax needs no bringing together: q (T, H, K), keys and values (n, G, S, K) -> (T, H, K).

    As products of batches, since one that spreads queries over blocks by itself takes half as long again.
    """
    (tokens, heads, _), (blocks, grouped, slots, size) = q.shape, keys.shape
    queries = q.transpose(0, 1).reshape(grouped, -1, size).to(keys.dtype)  # (G, R * T, K)
    queries = queries.expand(blocks, -1, -1, -1).reshape(blocks * grouped, -1, size)
    scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2)).float()
    scores = scores.view(blocks, heads, tokens, slots) + mask.view(blocks, 1, tokens, slots)
    seen = scores.permute(1, 2, 0, 3).reshape(heads, tokens, -1).softmax(-1)
    seen = seen.view(heads, tokens, blocks, slots).permute(2, 0, 1, 3).reshape(blocks * grouped, -1, slots)
    output = torch.bmm(seen.to(values.dtype), values.flatten(0, 1)).view(blocks, heads, tokens, size)
    return output.sum(0).transpose(0, 1).to(q.dtype)
