"""Token rows, and micro-batches made of them.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tunesmith.data.batch import IGNORED, Batch
from tunesmith.data.cache import Documents
from tunesmith.data.packing import Integers
from tunesmith.data.units import Units

_MULTIPLE = 8


@dataclass(frozen=True)
class TokenRow:
    """One row before padding. All arrays are (T,)."""

    inputs: np.ndarray
    labels: np.ndarray
    lengths: Integers
    """Inputs of each document in the row."""
    values: np.ndarray | None = None
    """(documents,) of preference data: the value of each."""
    index: Integers | None = None
    """Where it was asked for: the place of each input among the tokens of all sources."""

    def __len__(self) -> int:
        return len(self.inputs)


EMPTY_ROW = TokenRow(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
"""Stands in where a rank has fewer rows than the others: all of it is padding."""


def token_row(
    documents: Documents, starts: Integers, lengths: Integers, join: bool = False, offset: int | None = None
) -> TokenRow:
    """The row that holds the segments at `starts`, each `lengths` inputs long.

    A label is the next token of the same document. With `join` the row is one document: labels run across the seams.
    `offset`: tokens of the sources before this one, where the row is to have an index.
    """
    if len(starts) == 1 and not join and offset is None:
        return _whole(documents, int(starts[0]), int(lengths[0]), lengths)
    inputs = _places(starts, lengths)
    if join:
        behind_last = int(inputs[-1]) + 1
        ends_there = documents.ends[np.searchsorted(documents.ends, behind_last)] == behind_last
        targets = np.append(inputs[1:], inputs[-1] if ends_there else behind_last)
        known = np.arange(len(targets)) < len(targets) - ends_there
        lengths = np.array([len(inputs)])
    else:
        targets = inputs + 1
        known = documents.mask[targets]
    labels = np.where(known, documents.ids[targets].astype(np.int64), IGNORED)
    index = None if offset is None else inputs + offset
    return TokenRow(documents.ids[inputs].astype(np.int64), labels, lengths, index=index)


def scored_row(
    documents: Documents, marks: Integers, starts: Integers, lengths: Integers, offset: int | None = None
) -> TokenRow:
    """The row that holds scored documents: a label says at which token a score is read, and what it is to be.

    `marks`: the places of all tokens in the mask.
    """
    inputs = _places(starts, lengths)
    scored = documents.mask[inputs]
    labels = np.full(len(inputs), IGNORED, np.int64)
    labels[scored] = documents.scores[np.searchsorted(marks, inputs[scored])]
    index = None if offset is None else inputs + offset
    return TokenRow(documents.ids[inputs].astype(np.int64), labels, lengths, index=index)


def _places(starts: Integers, lengths: Integers) -> Integers:
    """Where the tokens of some segments stand in the flat array."""
    behind = np.cumsum(lengths) - lengths
    return np.repeat(starts - behind, lengths) + np.arange(int(lengths.sum()))


def _whole(documents: Documents, start: int, length: int, lengths: Integers) -> TokenRow:
    """The same for one segment, without gathering."""
    labels = documents.ids[start + 1 : start + length + 1].astype(np.int64)
    labels[~documents.mask[start + 1 : start + length + 1]] = IGNORED
    return TokenRow(documents.ids[start : start + length].astype(np.int64), labels, lengths)


def padded(length: int, limit: int) -> int:
    """`length` rounded up to a multiple of 8, which tensor cores like, but not beyond `limit`."""
    return max(length, min(limit, max(1, -(-length // _MULTIPLE)) * _MULTIPLE))


def collate(
    rows: Sequence[TokenRow],
    pad_id: int,
    packed: bool,
    limit: int,
    width: int | None = None,
    pin: bool = False,
    units: Units | None = None,
    with_index: bool = False,
) -> Batch:
    """A micro-batch of `rows`, padded on the right to `width`, or to the longest row and a multiple of 8 (at most `limit`).

    `packed`: documents are marked, and positions restart at each; else a row is one document. `units`: what preference
    data consists of; then there are extra["values"], and units are counted.
    """
    width = width or padded(max(map(len, rows)), limit)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64, pin_memory=pin)
    labels = torch.full(shape, IGNORED, dtype=torch.int64, pin_memory=pin)
    positions = torch.empty(shape, dtype=torch.int64, pin_memory=pin)
    documents = torch.full(shape, -1, dtype=torch.int32, pin_memory=pin) if packed else None
    extra: dict[str, torch.Tensor] = {}
    if units:
        extra["values"] = torch.zeros(shape, dtype=torch.float32, pin_memory=pin)
    if with_index:
        extra["index"] = torch.full(shape, -1, dtype=torch.int64, pin_memory=pin)
    ids, targets, places = input_ids.numpy(), labels.numpy(), positions.numpy()
    marks = None if documents is None else documents.numpy()
    places[:] = np.arange(width)
    for number, row in enumerate(rows):
        length = len(row)
        ids[number, :length] = row.inputs
        targets[number, :length] = row.labels
        if marks is not None:
            places[number, :length] -= np.repeat(np.cumsum(row.lengths) - row.lengths, row.lengths)
            places[number, length:] -= length
            marks[number, :length] = np.repeat(np.arange(len(row.lengths), dtype=np.int32), row.lengths)
        if row.values is not None:
            extra["values"].numpy()[number, :length] = np.repeat(row.values, row.lengths)
        if row.index is not None:
            extra["index"].numpy()[number, :length] = row.index
    most = max((len(row.lengths) for row in rows), default=1) if packed else 1
    counts = {"tokens": int(np.count_nonzero(targets != IGNORED))}
    if units and marks is not None:
        most = max(most, units.size)
        counts |= _counted(units, rows, targets, marks)
    return Batch(input_ids, labels, positions, documents, extra, counts, max(1, most))


def _counted(units: Units, rows: Sequence[TokenRow], labels: np.ndarray, documents: np.ndarray) -> dict[str, int]:
    if units.counted == "steps":
        return {"steps": int(np.count_nonzero(labels != IGNORED))}
    counts = {units.counted: sum(len(row.lengths) for row in rows) // units.size}
    if units.counted == "pairs" and not units.scored:
        counts["chosen_tokens"] = int(np.count_nonzero((labels != IGNORED) & (documents % 2 == 0)))
    return counts
