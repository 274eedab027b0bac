"""Sums over the documents of packed rows.

B rows, T tokens, M documents a row.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.nn.collectives import shared_sum
from tunesmith.nn.sequence_shards import SequenceShards


def document_sums(values: Tensor, documents: Tensor, most: int, shards: SequenceShards | None = None) -> Tensor:
    """The sum of `values` (B, T) over the tokens of each document: (B, M = most), 0 where a row has fewer.

    documents: (B, T), number of each token's document in its row, -1 for padding. shards: where ranks share rows; the
    sums are then over all of them and the same on each, and gradients are summed, so a loss made of them counts on
    each rank with 1 / ranks.
    """
    sums = values.new_zeros(len(values), most)
    sums = sums.scatter_add(1, documents.clamp(min=0).long(), values.masked_fill(documents < 0, 0))
    return sums if shards is None else shared_sum(sums, shards.group)
