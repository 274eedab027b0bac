"""A model that reads tokens of many sequences at once and remembers them.

L tokens of a pass, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunesmith.generation.blocks import Blocks
from tunesmith.generation.compiled import CompiledSteps
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head
from tunesmith.nn.kv_cache import BLOCK_SIZE, BlockPool, Chunk, Group, Pass, Rows, Steps, blocks_of, groups_of
from tunesmith.nn.linear import packing
from tunesmith.nn.part import let_go

_FEW = 48
"""New tokens of a sequence for which it is attended to block by block, beside others, not on its own."""


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


@contextlib.contextmanager
def generating(model: CausalLM) -> Iterator[None]:
    """Without gradients and dropout, and afterwards as it was. Its weights must not change meanwhile."""
    was_training = model.training
    model.eval()
    # What `fully_shard` gathers into must not become inference tensors: training could not use them again.
    is_sharded = any(hasattr(module, "unshard") for module in model.modules())
    try:
        with torch.no_grad() if is_sharded else torch.inference_mode(), packing(_matrices(model)):
            yield
    finally:
        let_go(model)
        model.train(was_training)


def _matrices(model: CausalLM) -> Iterator[Tensor]:
    """Weights (O, I) of its layers and its head, as far as they are held in full."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Head)) and "weight" in module._parameters:
            yield module.weight
        elif isinstance(module, Head) and module.tied_to is not None:
            yield module.tied_to.weight


class Reader:
    """Brings tokens of sequences through the model in passes, and keeps their keys and values."""

    def __init__(self, model: CausalLM, num_tokens: int, shares: bool = False, compile_for: int | None = None):
        """
        Args:
            num_tokens: what the memory holds.
            shares: what sequences begin with is read once for those that begin alike.
            compile_for: sequences of a batch for which steps are compiled; None: they are not.
        """
        self.model, self.device = model, model.model.device
        # Adapters compute in float32 and norms may widen: what comes in is of the stream's number type.
        self.pool = BlockPool(model.config, -(-num_tokens // BLOCK_SIZE), model.model.compute_dtype, self.device)
        self.blocks = Blocks(self.pool.num_blocks, self.pool.block_size, shares)
        self._apart_from = self.pool.num_blocks // 2 if shares else None
        self._compiled = None if compile_for is None else CompiledSteps(model, self.pool, compile_for)
        self._plan: tuple[list[tuple[int, ...]], Rows | list[Group]] = ([], [])

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

    def read(self, entries: Sequence[tuple[Memory, Sequence[int]]]) -> Tensor:
        """One pass over memories' next tokens, which need not stay: hidden states (L, D), entry by entry.

        There must be blocks for all (`grow`). What counts as `read` of the memories stays as it is.
        """
        ones, few, many = _by_size(entries)
        line = [*ones, *few, *many]
        ids, positions, blocks, lengths = [], [], [], []
        size = self.pool.block_size
        for memory, new in (entries[index] for index in line):
            places = range(memory.read, memory.read + len(new))
            ids += new
            positions += places
            blocks += [memory.table[place // size] for place in places]
            lengths += [max(len(memory.ids), places.stop)] * len(new)
        numbers = torch.tensor([ids, positions, blocks, lengths], device=self.device)
        where, places = numbers[1], numbers[1] % size
        parts: list[Steps | Chunk] = []
        if ones:
            ways = self._blocks([entries[index][0] for index in ones])
            if self._compiled and isinstance(ways, list) and len(ones) == len(line) and self._compiled.fits(ways):
                return self._in_order(self._compiled.read(numbers[0], where, numbers[2], places, ways), entries, line)
            parts.append(Steps(0, len(ones), len(ones), 1, ways, where[: len(ones), None], size))
        if few:
            parts.append(self._rectangle([entries[index] for index in few], len(ones)))
        for index in many:
            memory, new = entries[index]
            start = parts[-1].stop if parts else 0
            table = torch.tensor(memory.table[: self.needed(memory.read + len(new))], device=self.device)
            parts.append(Chunk(start, start + len(new), memory.read, table))
        depends = self.model.config.depends_on_length
        made = Pass(self.pool, where[None], self.pool.slots(numbers[2], places), numbers[3] if depends else None, parts)
        return self._in_order(self.model(numbers[:1], cache=made)[0], entries, line)

    def _in_order(self, hidden: Tensor, entries: Sequence[tuple[Memory, Sequence[int]]], line: list[int]) -> Tensor:
        """What came out in the order of the line, in that of the entries."""
        if line == sorted(line):
            return hidden
        starts, start = {}, 0
        for index in line:
            starts[index] = start
            start += len(entries[index][1])
        rows = [starts[index] + place for index, (_, new) in enumerate(entries) for place in range(len(new))]
        return hidden[torch.tensor(rows, device=self.device)]

    def _blocks(self, memories: list[Memory]) -> Rows | list[Group]:
        """How to go through their blocks for one token more; made anew only when one has another list of them."""
        tables = [tuple(memory.table[: self.needed(memory.read + 1)]) for memory in memories]
        if self._plan[0] != tables:
            if self._compiled is None:
                self._plan = tables, blocks_of(tables, self.pool, self._apart_from)
            else:
                self._plan = tables, groups_of(tables, self.pool, self._apart_from, self._compiled.batch_size)
        return self._plan[1]

    def _rectangle(self, entries: list[tuple[Memory, Sequence[int]]], start: int) -> Steps:
        """Several tokens of each, not equally many."""
        most, size = max(len(new) for _, new in entries), self.pool.block_size
        tables = [memory.table[: self.needed(memory.read + len(new))] for memory, new in entries]
        positions = torch.full((len(entries), most), -1)
        places: list[int] = []
        for row, (memory, new) in enumerate(entries):
            positions[row, : len(new)] = torch.arange(memory.read, memory.read + len(new))
            places += range(row * most, row * most + len(new))
        ways = blocks_of(tables, self.pool, self._apart_from)
        shape = (start, start + len(places), len(entries), most)
        where = torch.tensor(places, device=self.device)
        return Steps(*shape, ways, positions.to(self.device), size, where)

    def _kind(self, memory: Memory) -> tuple[int, ...]:
        return self.model.length_class(len(memory.ids))


def _by_size(entries: Sequence[tuple[Memory, Sequence[int]]]) -> tuple[list[int], list[int], list[int]]:
    """Which entries are one token of a sequence that is known, few of one, and many or the first of one."""
    ones, few, many = [], [], []
    for index, (memory, new) in enumerate(entries):
        if not memory.read or len(new) > _FEW:
            many.append(index)
        else:
            (ones if len(new) == 1 else few).append(index)
    return ones, few, many
