"""Rows shared by the ranks of a group: each computes some of the tokens, and attention brings all keys and values together.

A row is cut into twice as many chunks as there are ranks; rank r has chunk r and chunk r from the end, so that under a causal
mask all ranks have the same work (as in arXiv 2407.21783, section 3.3.2).

B batch, T tokens of a whole row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.nn.collectives import gathered


class SequenceShards:
    """How a group's ranks share rows (B, T, …). T must be a multiple of `chunks`."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.chunks = 2 * self.ranks

    def own(self, whole: Tensor) -> Tensor:
        """(B, T, …) -> (B, T / ranks, …), this rank's tokens."""
        chunks = whole.chunk(self.chunks, 1)
        return torch.cat([chunks[number] for number in self._numbers(self.rank)], 1)

    def whole(self, own: Tensor) -> Tensor:
        """(B, T / ranks, …) -> (B, T, …) in the row's order, on every rank; gradients of all ranks are summed."""
        chunks = gathered(own, 1, self.group, sums=True).chunk(self.chunks, 1)
        order = [number for rank in range(self.ranks) for number in self._numbers(rank)]
        return torch.cat([chunks[order.index(number)] for number in range(self.chunks)], 1)

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """Where this rank's two chunks lie in a row of T = `length` tokens."""
        size = length // self.chunks
        return [(number * size, (number + 1) * size) for number in self._numbers(self.rank)]

    def _numbers(self, rank: int) -> tuple[int, int]:
        return rank, self.chunks - 1 - rank
