"""A model that reads tokens of many sequences at once and remembers them.

L tokens of a pass, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.generation.blocks import Blocks
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.kv_cache import BLOCK_SIZE, BlockPool, Chunk, Group, Pass, Steps, groups_of


@dataclass(eq=False)
class Memory:
    """The tokens of one sequence, and how many of them the model has read."""

    ids: list[int]
    table: list[int] = field(default_factory=list)
    """The blocks that hold what was read."""
    read: int = 0
    shared: bool = False
    """Whether others are expected to begin alike."""
    kind: tuple[int, ...] = ()
    """The kind of rotary frequencies that it was read with."""
    wanted_from: int | None = None
    """Set where hidden states from this token on are wanted: others' reading saves none of these."""

    @property
    def reusable(self) -> list[int]:
        """Those whose reading, but for the last, may be saved."""
        return self.ids if self.wanted_from is None else self.ids[: self.wanted_from + 1]

    @property
    def unread(self) -> int:
        return len(self.ids) - self.read


class Reader:
    """Brings tokens of sequences through the model in passes, and keeps their keys and values."""

    def __init__(self, model: CausalLM, num_tokens: int, shares: bool = False):
        """num_tokens: what the memory holds. shares: what sequences begin with is read once for those that begin alike."""
        self.model, self.device = model, model.model.device
        # Adapters compute in float32 and norms may widen: what comes in is of the stream's number type.
        self.pool = BlockPool(model.config, -(-num_tokens // BLOCK_SIZE), model.model.compute_dtype, self.device)
        self.blocks = Blocks(self.pool.num_blocks, self.pool.block_size, shares)
        self._plan: tuple[list[tuple[int, ...]], list[Group]] = ([], [])

    def begin(self, memory: Memory, shared: bool = False) -> None:
        """Take what is known of its beginning."""
        memory.shared, memory.kind = shared, self._kind(memory)
        found = self.blocks.find(memory.reusable, self._kind(memory))
        self.blocks.hold(found.blocks)
        memory.table, memory.read = list(found.blocks), len(found.blocks) * self.pool.block_size
        if found.tail is not None:
            own = self.blocks.take()
            if own is not None:
                self.pool.copy(found.tail, own)
                memory.table.append(own)
                memory.read = found.length

    def known_of(self, memory: Memory) -> int:
        """How many of its tokens need not be read."""
        return self.blocks.find(memory.reusable, self._kind(memory)).length

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.pool.block_size)

    def grow(self, memory: Memory, length: int) -> bool:
        """Take blocks for the first `length` tokens; False, and nothing taken that is not kept, where there are not enough."""
        while len(memory.table) * self.pool.block_size < length:
            at_end = memory.shared and (len(memory.table) + 1) * self.pool.block_size <= len(memory.ids)
            block = self.blocks.take(at_end)
            if block is None:
                return False
            memory.table.append(block)
        return True

    def forget(self, memory: Memory) -> None:
        """Give all its blocks back."""
        self.blocks.release(memory.table)
        memory.table, memory.read, memory.kind = [], 0, self._kind(memory)

    def tell(self, memory: Memory, length: int, whole: bool) -> None:
        """Let others go on from its first `length` tokens, which are read. whole: they are all that it began with."""
        self.blocks.know(memory.ids[:length], memory.table, self._kind(memory), whole)

    def outdated(self, memory: Memory) -> bool:
        """Whether what was read has other rotary frequencies than the sequence as it is now."""
        return memory.read > 0 and memory.kind != self._kind(memory)

    def read(self, steps: Sequence[tuple[Memory, Sequence[int]]], chunks: Sequence[tuple[Memory, int]] = ()) -> Tensor:
        """One pass. Hidden states (L, D): of the steps in rows of equal length, then of the chunks.

        steps: memories of which at least one token is read, with the tokens to read next (which need not stay); rows are as long as
            the longest. chunks: memories with the number of their next tokens to read. There must be blocks for all (`grow`).
        """
        tokens = max((len(new) for _, new in steps), default=0)
        ids, positions, blocks, lengths = [], [], [], []
        size = self.pool.block_size

        def add(memory: Memory, new: Sequence[int]) -> None:
            for place, number in enumerate(new, memory.read):
                ids.append(number)
                positions.append(place)
                blocks.append(memory.table[place // size])
            lengths.extend([max(len(memory.ids), memory.read + len(new))] * len(new))

        for memory, new in steps:
            add(memory, new)
            padding = tokens - len(new)
            ids.extend([0] * padding)
            positions.extend([-1] * padding)
            blocks.extend([self.pool.nowhere] * padding)
            lengths.extend([1] * padding)
        made = []
        for memory, count in chunks:
            start = len(ids)
            add(memory, memory.ids[memory.read : memory.read + count])
            table = memory.table[: self.needed(memory.read + count)]
            made.append(Chunk(start, len(ids), memory.read, torch.tensor(table, device=self.device)))
        numbers = torch.tensor([ids, positions, blocks, lengths], device=self.device)
        where = numbers[1]
        rectangle = None
        if steps:
            rows = where[: len(steps) * tokens].view(len(steps), tokens)
            groups = self._groups([memory for memory, _ in steps], tokens)
            rectangle = Steps(len(steps), tokens, groups, rows, size)
        line = Pass(
            self.pool,
            where[None],
            (numbers[2], where.clamp(min=0) % size),
            numbers[3] if self.model.config.depends_on_length else None,
            rectangle,
            made,
        )
        return self.model(numbers[:1], cache=line)[0]

    def _groups(self, memories: list[Memory], tokens: int) -> list[Group]:
        """How to go through their blocks; made anew only when one has another list of them."""
        tables = [tuple(memory.table[: self.needed(memory.read + tokens)]) for memory in memories]
        if self._plan[0] != tables:
            self._plan = tables, groups_of(tables, self.pool, self.pool.num_blocks // 2)
        return self._plan[1]

    def _kind(self, memory: Memory) -> tuple[int, ...]:
        return self.model.length_class(len(memory.ids))
