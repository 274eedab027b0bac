"""Which blocks of a pool belong to which sequences, and which of them hold the beginnings that others can go on from."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beginning:
    """What is known already of a sequence's first tokens."""

    blocks: list[int]
    """Full ones, to be shared."""
    tail: int | None
    """A block whose first tokens are the ones after these, to be copied."""
    length: int
    """Tokens in all."""


class Blocks:
    """Counts the owners of each block. With `shares`, remembers what full blocks hold, also when nobody owns them any more.

    Own blocks are taken from one end of the pool and those of shared beginnings from the other, so that each kind lies close together.
    """

    def __init__(self, num_blocks: int, block_size: int, shares: bool):
        self.num_blocks, self.block_size, self.shares = num_blocks, block_size, shares
        self._owners = [0] * num_blocks
        self._free = set(range(num_blocks))
        self._lowest, self._highest = list(range(num_blocks)), [-block for block in reversed(range(num_blocks))]
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody owns but whose content is known, the longest unused first."""
        self._known: dict[Hashable, tuple[int, int]] = {}
        """{(what comes before, tokens): (block, number that stands for all up to here)}"""
        self._keys: dict[int, list[Hashable]] = {}
        """{block: its keys in _known}"""
        self._last_number = 0

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._free) + len(self._kept)

    def take(self, at_end: bool = False) -> int | None:
        """A block of one's own; None where there is none left."""
        if not self._free:
            if not self._kept:
                return None
            self._forget(self._kept.popitem(last=False)[0])
        heap = self._highest if at_end else self._lowest
        block = abs(heapq.heappop(heap))
        while block not in self._free:  # taken from the other end
            block = abs(heapq.heappop(heap))
        self._free.remove(block)
        self._owners[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """One owner more for each."""
        for block in blocks:
            self._owners[block] += 1
            self._kept.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each."""
        for block in reversed(blocks):  # ends are forgotten before beginnings
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._keys:
                self._kept[block] = None
            else:
                self._put_back(block)

    def owners(self, block: int) -> int:
        return self._owners[block]

    def find(self, ids: Sequence[int], kind: Hashable = None) -> Beginning:
        """The longest known beginning of `ids`, always less than all of it. kind: what else must be the same."""
        size = self.block_size
        blocks: list[int] = []
        number: Hashable = (kind,)
        while self.shares and (len(blocks) + 1) * size < len(ids):
            found = self._known.get((number, tuple(ids[len(blocks) * size : (len(blocks) + 1) * size])))
            if found is None:
                break
            block, number = found
            blocks.append(block)
        done = len(blocks) * size
        # Of the rest all but the last token may be known, if a sequence had just this beginning.
        tail = self._known.get((number, tuple(ids[done : len(ids) - 1]), "tail")) if self.shares else None
        if tail is None:
            return Beginning(blocks, None, done)
        return Beginning(blocks, tail[0], len(ids) - 1)

    def know(self, ids: Sequence[int], table: Sequence[int], kind: Hashable = None, whole: bool = False) -> None:
        """Remember that the blocks `table` hold `ids`: the full ones, and if it is `whole`, also what lies behind these but for the last token."""
        if not self.shares:
            return
        size, number = self.block_size, (kind,)
        count = len(ids) // size
        for place in range(count):
            number = self._remember((number, tuple(ids[place * size : (place + 1) * size])), table[place])
        rest = tuple(ids[count * size : len(ids) - 1])
        if whole and rest:
            self._remember((number, rest, "tail"), table[count])

    def _remember(self, key: Hashable, block: int) -> Hashable:
        if key not in self._known:
            self._last_number += 1
            self._known[key] = (block, self._last_number)
            self._keys.setdefault(block, []).append(key)
        return self._known[key][1]

    def _forget(self, block: int) -> None:
        for key in self._keys.pop(block, ()):
            del self._known[key]
        self._put_back(block)

    def _put_back(self, block: int) -> None:
        self._free.add(block)
        heapq.heappush(self._lowest, block)
        heapq.heappush(self._highest, -block)
