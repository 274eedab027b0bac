"""Steps as compiled programs: one token of each of many sequences, in shapes that come again.

On CUDA they are recorded as graphs, so that a step costs one launch instead of hundreds.

B sequences (padded to the engine's batch), L tokens, D hidden, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.decoder import CausalLM
from tunesmith.nn.attention import Sight
from tunesmith.nn.kv_cache import BlockPool, Group, Pass, Steps

_PROGRAMS = 64
"""At most so many are compiled for one model; the compiler gives up after 8 unless it is told."""


_FEWEST = 64
"""Blocks that even the smallest program goes through."""


class CompiledSteps:
    """The decoder, compiled for every number of blocks that comes: powers of two, so that these are few."""

    def __init__(self, model: CausalLM, pool: BlockPool, batch_size: int):
        self.model, self.pool, self.batch_size = model, pool, batch_size
        for store in (*pool.keys, *pool.values):  # written in place, at one address: graphs may hold on to it
            torch._dynamo.mark_static_address(store)
        is_cuda = pool.device.type == "cuda"
        self._program = torch.compile(
            self._hidden, fullgraph=True, dynamic=False, mode="reduce-overhead" if is_cuda else None
        )

    def fits(self, groups: Sequence[Group]) -> bool:
        """Whether the blocks lie together: own ones at the pool's beginning, with one owner, and shared ones at its end."""
        together = all(isinstance(group.blocks, slice) for group in groups)
        counts = [group.owners_per_block for group in groups]
        return together and counts in ([1], [1, self.batch_size]) and not self.model.config.depends_on_length

    def read(self, ids: Tensor, positions: Tensor, blocks: Tensor, places: Tensor, groups: Sequence[Group]) -> Tensor:
        """Hidden states (L, D) of one token of each of L sequences, whose `ids`, `positions`, `blocks` and places in these are (L,)."""
        count = len(ids)
        more = self.batch_size - count
        # Their Python lists are read by the compiler as constants, their tensors as inputs.
        padded = [self._padded(group, count) for group in groups]
        inputs = (F.pad(ids, (0, more)), F.pad(positions, (0, more), value=-1))
        where = (F.pad(blocks, (0, more), value=self.pool.nowhere), F.pad(places, (0, more)))
        cos_sin = self.model._cos_sin(inputs[1][None], None)
        with torch._dynamo.config.patch(recompile_limit=_PROGRAMS, accumulated_recompile_limit=4 * _PROGRAMS):
            hidden = self._program(*inputs, *where, cos_sin, padded)
        return hidden[0, :count].clone()  # the next run of a graph writes over its output

    def _hidden(self, ids: Tensor, positions: Tensor, blocks: Tensor, places: Tensor, cos_sin, groups: list[Group]):
        steps = Steps(0, self.batch_size, self.batch_size, 1, groups, positions[:, None], self.pool.block_size)
        line = Pass(self.pool, positions[None], self.pool.slots(blocks, places), None, [steps])
        return self.model.model(ids[None], Sight({}, cos_sin, cached=line))

    def _padded(self, group: Group, rows: int) -> Group:
        """The same blocks and some more, which belong to nobody."""
        assert isinstance(group.blocks, slice)
        start, stop, size, total = group.blocks.start, group.blocks.stop, group.owners_per_block, self.pool.num_blocks
        at_end = 2 * start > total
        if at_end:
            first, last = max(0, total - _padded_size(total - start)), total
        else:
            first, last = 0, min(total, _padded_size(stop))
        before, behind = (start - first) * size, (last - stop) * size
        owners = torch.where(group.owners == rows, self.batch_size, group.owners)
        owners = F.pad(owners, (before, behind), value=self.batch_size)
        return Group(slice(first, last), owners, F.pad(group.firsts, (before, behind)), size)


def _padded_size(number: int) -> int:
    return max(_FEWEST, 1 << (number - 1).bit_length())
