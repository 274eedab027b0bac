"""Keys and values of tokens seen before, in blocks of which every sequence has its own list.

N blocks, S slots of a block, G key-value heads, K head size, R query heads for each of these, B sequences, T new tokens of each,
L tokens of a pass, J blocks of a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tunesmith.nn.config import DecoderConfig
from tunesmith.nn.kernels import chunk_mask

BLOCK_SIZE = 32
"""Tokens of a block: small blocks waste little behind a sequence's end, large ones are quicker to go through."""
_FEW_NUMBERS = 1 << 18
"""Numbers of a layer's keys up to which sequences' blocks are copied into rows: measured on a CPU, 4 times as fast for those of tiny models
and still a little faster at this size, where a copy just stays in the processor's cache."""


class BlockPool:
    """The memory: for every layer keys and values (N, G, S, K). Which block is whose, its users know."""

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        block_size: int = BLOCK_SIZE,
    ):
        device = torch.device(device or "cpu")
        if device.type == "cpu" and dtype.itemsize < 4:
            dtype = torch.float32  # half precision would be widened at every look
        self.config, self.num_blocks, self.block_size, self.device = config, num_blocks, block_size, device
        # One block more takes what isn't to be kept (padding). Layers of other heads or sizes would differ here.
        shape = (num_blocks + 1, config.num_key_value_heads, block_size, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self._copies: list[Tensor | None] = [None, None]

    @property
    def nowhere(self) -> int:
        """The block for what isn't kept."""
        return self.num_blocks

    @property
    def bytes_per_block(self) -> int:
        return sum(part[0].numel() * part.element_size() for part in (*self.keys, *self.values))

    def slots(self, blocks: Tensor, places: Tensor) -> Tensor:
        """Where the keys and values of a line go, for `write`: places (L,) in blocks (L,) -> (L * G,)."""
        heads = self.keys[0].shape[1]
        first = blocks * (heads * self.block_size) + places
        return (first[:, None] + torch.arange(heads, device=first.device) * self.block_size).flatten()

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put the line's keys and values (L, G, K) into `slots`, which are found once for all layers."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store.view(-1, store.shape[-1]).index_copy_(0, slots, new.to(store.dtype).flatten(0, 1))

    def copy(self, source: int, target: int) -> None:
        """The content of a block into another."""
        for store in (*self.keys, *self.values):
            store[target] = store[source]

    def of_sequence(self, layer: int, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, G, length, K) of the sequence with the blocks `table` (J,)."""
        parts = (store[layer].index_select(0, table) for store in (self.keys, self.values))
        keys, values = (part.transpose(0, 1).flatten(1, 2)[None, :, :length] for part in parts)
        return keys, values

    def of_rows(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, J * S, K) of a few sequences side by side; they hold until the next call."""
        size = self.block_size * self.keys[layer].shape[-1]
        copies = []
        for number, store in enumerate((self.keys[layer], self.values[layer])):
            index = store.view(-1, size), 0, rows.parts
            if store.requires_grad:
                target = torch.index_select(*index)
            else:
                # Into memory that was there before: pages that are touched for the first time cost ten times as much as the copy.
                target = torch.index_select(*index, out=self._copy(number, len(rows.parts), size))
            copies.append(target.view(rows.sequences, -1, rows.blocks * self.block_size, store.shape[-1]))
        return copies[0], copies[1]

    def _copy(self, number: int, count: int, size: int) -> Tensor:
        """(count, size) of the memory for copies, one of which is for keys and one for values."""
        held = self._copies[number]
        if held is None:
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                held = self._copies[number] = self.keys[0].new_empty(_FEW_NUMBERS)
        return held[: count * size].view(count, size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever lies there: a slot that nobody sees still meets a product with 0, and 0 * nan is nan."""
    if device.type == "cpu":
        # Memory that the system fills with zeros as it is touched: what no sequence reaches costs nothing.
        return torch.from_numpy(np.zeros(shape, dtype=str(dtype).removeprefix("torch.")))
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Chunk:
    """Several tokens of one sequence, read together."""

    start: int
    """Where they stand in the pass's line."""
    stop: int
    past: int
    """Tokens of the sequence before them, whose keys are in the pool."""
    table: Tensor
    """(J,) the sequence's blocks."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """(1, 1, T, past + T) bool, True where a token is seen."""
        if window not in self._masks:
            end = self.past + self.stop - self.start
            self._masks[window] = chunk_mask((self.past, end), window, self.table.device)
        return self._masks[window]


@dataclass(frozen=True)
class Group:
    """Blocks with up to `owners_per_block` owners, gone through in place."""

    blocks: slice | Tensor
    """Which of the pool's: n of them."""
    owners: Tensor
    """(n * owners_per_block,) the sequences that see each block: 0 to B - 1, B for nobody."""
    firsts: Tensor
    """(n * owners_per_block,) position of each block's first token in its owner."""
    owners_per_block: int


@dataclass(frozen=True)
class Rows:
    """Blocks that are few enough to be copied side by side, so that one kernel sees each sequence as a row."""

    parts: Tensor
    """(B * G * J,) of the pool's (N * G) blocks of a head; behind a sequence's own, its first one again, which isn't seen there."""
    sequences: int
    blocks: int
    """J, of the longest sequence."""


@dataclass
class Steps:
    """The next few tokens, up to T, of each of B sequences, attended to row by row or block by block."""

    start: int
    """Where they stand in the pass's line."""
    stop: int
    rows: int
    tokens: int
    blocks: Rows | list[Group]
    """Of all sequences, and how they are gone through."""
    positions: Tensor
    """(B, T); negative: padding."""
    block_size: int
    places: Tensor | None = None
    """(stop - start,) each token's place in the B * T; None: they are all there, in this order."""
    _masks: dict[int | None, list[Tensor]] = field(default_factory=dict)

    def group_masks(self, groups: list[Group], window: int | None) -> list[Tensor]:
        """For each group what is added to the scores: (n, 1, M, 1, T, S) float32, 0 where a token is seen."""
        if window not in self._masks:
            self._masks[window] = [self._group_mask(group, window) for group in groups]
        return self._masks[window]

    def row_mask(self, rows: Rows, window: int | None, queries: int, dtype: torch.dtype) -> Tensor:
        """The same for rows, where each of the T tokens stands for `queries` heads: (B, 1, T * R, J * S) of `dtype`."""
        if window not in self._masks:
            keys = torch.arange(rows.blocks * self.block_size, device=self.positions.device)
            places = self.positions.clamp(min=0)[:, :, None]  # padding sees what a first token would
            hidden = keys > places if window is None else (keys > places) | (keys <= places - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = [mask[:, None, :, None].expand(-1, -1, -1, queries, -1).flatten(2, 3)]
        return self._masks[window][0]

    def _group_mask(self, group: Group, window: int | None) -> Tensor:
        # To whom nobody belongs sees nothing; padding sees what a first token would.
        queries = torch.cat([self.positions.clamp(min=0), self.positions.new_full((1, self.tokens), -1)])
        queries = queries.index_select(0, group.owners)[:, :, None]
        keys = (group.firsts[:, None] + torch.arange(self.block_size, device=group.firsts.device))[:, None]
        seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
        # The smallest number, not -inf: of a block that is hidden whole, -inf - -inf would be nan.
        hidden = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo(torch.float32).min)
        return hidden.view(-1, 1, group.owners_per_block, 1, self.tokens, self.block_size)


@dataclass
class Pass:
    """A forward pass over new tokens of sequences whose earlier ones are in the pool. They stand in one line."""

    pool: BlockPool
    positions: Tensor
    """(1, L); negative: padding."""
    slots: Tensor
    """Where their keys and values go, as `BlockPool.slots` says."""
    lengths: Tensor | None
    """(L,) tokens of each token's sequence with the new ones, for rotary frequencies that depend on it."""
    parts: list[Steps | Chunk]
    """What the line is made of, in its order; padding may lie between and behind."""


def blocks_of(tables: Sequence[Sequence[int]], pool: BlockPool, low: int | None = None) -> Rows | list[Group]:
    """How to go through the blocks of B sequences: as rows where they are few, else in groups, for which `low` is."""
    count, most = len(tables), max(map(len, tables))
    _, heads, slots, size = pool.keys[0].shape
    if not all(tables) or count * most * heads * slots * size > _FEW_NUMBERS:
        return groups_of(tables, pool, low)
    padded = np.array([[*table, *[table[0]] * (most - len(table))] for table in tables])
    parts = padded[:, None] * heads + np.arange(heads)[:, None]
    return Rows(torch.from_numpy(parts.ravel()).to(pool.device), count, most)


def groups_of(
    tables: Sequence[Sequence[int]], pool: BlockPool, low: int | None = None, room: int | None = None
) -> list[Group]:
    """How to go through the blocks of B sequences.

    Blocks from `low` on are looked at apart: a pool may keep what is shared at one end. Neighbours are looked at where they lie,
    with holes between them for nobody; blocks that lie far apart are copied together first. room: owners that each block
    from `low` on is given room for, so that these make one group; None: as few as do.
    """
    sizes = [len(table) for table in tables]
    blocks = np.fromiter(itertools.chain.from_iterable(tables), np.int64, sum(sizes))
    rows = np.repeat(np.arange(len(tables)), sizes)
    firsts = (np.arange(len(blocks)) - np.repeat(np.cumsum(sizes) - sizes, sizes)) * pool.block_size
    order = np.argsort(blocks, kind="stable")
    blocks, rows, firsts = blocks[order], rows[order], firsts[order]
    distinct, starts, counts = np.unique(blocks, return_index=True, return_counts=True)
    places = np.arange(len(blocks)) - np.repeat(starts, counts)  # of each owner among those of its block
    is_apart = distinct >= (pool.num_blocks + 1 if low is None else low)
    classes = 1 << np.ceil(np.log2(counts)).astype(np.int64)
    if room is not None:
        classes[is_apart] = room
    groups = []
    for apart, size in sorted(set(zip(is_apart.tolist(), classes.tolist()))):
        chosen = (is_apart == apart) & (classes == size)
        entries = np.repeat(chosen, counts)
        seen = (blocks[entries], places[entries], rows[entries], firsts[entries])
        groups.append(_group(distinct[chosen], *seen, size, len(tables), pool))
    return groups


def _group(
    distinct: np.ndarray,
    blocks: np.ndarray,
    places: np.ndarray,
    rows: np.ndarray,
    firsts: np.ndarray,
    size: int,
    nobody: int,
    pool: BlockPool,
) -> Group:
    """Of the blocks `distinct`, in order: each of `blocks` has `rows` for its owner number `places`, in which it stands at `firsts`."""
    start, stop = int(distinct[0]), int(distinct[-1]) + 1
    in_place = stop - start <= 2 * len(distinct)
    where = blocks - start if in_place else np.searchsorted(distinct, blocks)
    shape = (stop - start if in_place else len(distinct), size)
    owners, begins = np.full(shape, nobody), np.zeros(shape, np.int64)
    owners[where, places], begins[where, places] = rows, firsts
    which = slice(start, stop) if in_place else torch.from_numpy(distinct).to(pool.device)
    made = (torch.from_numpy(numbers.ravel()).to(pool.device) for numbers in (owners, begins))
    return Group(which, *made, owners_per_block=size)


class KVCache:
    """The tokens of B rows, for `model(input_ids, cache=cache)`: every call adds (B, T) of them."""

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        blocks = -(-max_length // BLOCK_SIZE)
        self.pool = BlockPool(config, batch_size * blocks, dtype, device)
        self.max_length = max_length
        self.tables = [list(range(row * blocks, (row + 1) * blocks)) for row in range(batch_size)]
        self.ids = torch.zeros(batch_size, max_length, dtype=torch.int64) if config.depends_on_length else None
        """The tokens themselves, where keys and values may have to be computed again."""
        self._length = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def length(self) -> Tensor:
        """(B,) tokens in each row, on the CPU."""
        return self._length

    @length.setter
    def length(self, length: int | Tensor) -> None:
        """Shorten rows, such as by the right padding of a batch of prompts."""
        new = torch.as_tensor(length, device="cpu")
        self._length = new.expand(len(self.tables)).clone()

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, (B',) indices."""
        self.tables = [self.tables[row] for row in rows.tolist()]
        self.ids = None if self.ids is None else self.ids[rows.cpu()]
        self._length = self._length[rows.cpu()]

    def places(self, tokens: int, positions: Tensor | None, documents: Tensor | None) -> Tensor:
        """Positions (B, T) of new tokens, negative for padding."""
        length = self._length[:, None]
        if positions is None and documents is None:
            positions = length + torch.arange(tokens)
        elif positions is None:
            assert documents is not None
            positions = length + (documents.cpu() >= 0).long().cumsum(-1) - 1
        positions = positions.cpu().expand(len(self.tables), tokens)
        return positions if documents is None else torch.where(documents.cpu() >= 0, positions, -1)

    def add(self, positions: Tensor) -> Pass:
        """The pass that brings new tokens at `positions` (B, T), which must follow each row's; they count from now on."""
        (rows, tokens), device = positions.shape, self.pool.device
        ends = torch.maximum(self._length, positions.amax(-1) + 1)
        if int(ends.max()) > self.max_length:
            raise ValueError(f"a cache of {self.max_length} tokens can't take {tokens} after {int(self._length.max())}")
        tables = torch.tensor(self.tables, device=device)
        where = positions.to(device)
        size = self.pool.block_size
        blocks = torch.where(where < 0, self.pool.nowhere, tables.gather(1, where.clamp(min=0) // size))
        slots = self.pool.slots(blocks.flatten(), (where.clamp(min=0) % size).flatten())
        lengths = None if self.ids is None else ends[:, None].expand(-1, tokens).flatten()
        parts: list[Steps | Chunk] = []
        if tokens == 1:
            used = [table[: -(-end // size)] for table, end in zip(self.tables, ends.tolist())]
            parts.append(Steps(0, rows, rows, 1, blocks_of(used, self.pool), where, size))
        else:
            for row, real in enumerate((positions >= 0).tolist()):
                if any(real):
                    first = row * tokens + real.index(True)
                    past = int(positions[row, real.index(True)])
                    needed = -(-int(ends[row]) // size)
                    parts.append(Chunk(first, first + sum(real), past, tables[row, :needed]))
        self._length = ends
        return Pass(self.pool, where.reshape(1, -1), slots, lengths, parts)
