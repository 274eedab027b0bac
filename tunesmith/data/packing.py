"""Which documents share a row, and in which order rows come: functions of lengths, seed and pass alone.

A *segment* is a piece of a document that stands in one row: `starts` its first token in the flat array of a source, and
`lengths` how many inputs it takes. An input's label is the token after it, so a document of n tokens needs n - 1 inputs.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """The rows of one pass over a source: row i holds the segments offsets[i] : offsets[i + 1]."""

    offsets: Integers
    starts: Integers
    lengths: Integers

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[Integers, Integers]:
        """Starts and lengths of the segments of a row."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.starts[part], self.lengths[part]

    def row_lengths(self) -> Integers:
        """Inputs in each row."""
        sums = np.concatenate([[0], np.cumsum(self.lengths)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]


def random_keys(count: int, *seed: int) -> NDArray[np.uint64]:
    """`count` pseudo-random 64-bit numbers that depend on `seed` alone, on every machine and with every version of numpy.

    Splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    state = np.uint64(0)
    for part in seed:
        state = _mixed(np.asarray(state ^ np.uint64(part % 2**64)))[()]
    with np.errstate(over="ignore"):
        return _mixed(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def shuffled(count: int, *seed: int) -> Integers:
    """A permutation of range(count) that depends on `seed` alone."""
    return np.argsort(random_keys(count, *seed), kind="stable")


# --- one document a row --------------------------------------------------------------------------


def single_rows(starts: Integers, lengths: Integers, seed: tuple[int, ...] | None) -> RowPlan:
    """Every segment is a row; in the order given where `seed` is None."""
    order = np.arange(len(starts)) if seed is None else shuffled(len(starts), *seed)
    return RowPlan(np.arange(len(starts) + 1), starts[order], lengths[order])


# --- several whole segments a row ----------------------------------------------------------------


def packed_rows(starts: Integers, lengths: Integers, capacity: int, seed: tuple[int, ...] | None) -> RowPlan:
    """Segments fill rows of at most `capacity` inputs by first-fit decreasing; none is cut.

    Which lengths meet in a row is the same for every seed, so every pass has the same number of rows; the seed says
    which documents of a length stand where, and in which order the rows come.
    """
    shapes, offsets = _filled(lengths, capacity)
    keys = np.arange(len(lengths)) if seed is None else random_keys(len(lengths), *seed, 1)
    members = np.empty(len(lengths), dtype=np.int64)
    members[np.argsort(shapes, kind="stable")] = np.lexsort((keys, lengths))
    row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if seed is None:
        first = np.minimum.reduceat(members, offsets[:-1]) if len(members) else members
        rank, within = np.argsort(np.argsort(first, kind="stable")), members
    else:
        rank, within = shuffled(len(offsets) - 1, *seed, 2), random_keys(len(members), *seed, 3)
    members = members[np.lexsort((within, rank[row_of]))]
    sizes = np.empty(len(offsets) - 1, dtype=np.int64)
    sizes[rank] = np.diff(offsets)
    return RowPlan(np.concatenate([[0], np.cumsum(sizes)]), starts[members], lengths[members])


def _filled(lengths: Integers, capacity: int) -> tuple[Integers, Integers]:
    """First-fit decreasing on the histogram of `lengths`: (lengths in the order of rows, row offsets).

    Rows of the same lengths are made in one go, so the time depends on how many different lengths there are.
    """
    counts = np.bincount(lengths, minlength=1)
    left = {int(length): int(counts[length]) for length in np.flatnonzero(counts)}
    sizes = sorted(left)
    shapes, row_sizes = [], []
    while sizes:
        room, place, row = capacity, len(sizes) - 1, {}
        while place >= 0:
            size = sizes[place]
            row[size] = min(left[size], room // size)
            room -= row[size] * size
            place = min(bisect_right(sizes, room), place) - 1
        copies = min(left[size] // number for size, number in row.items())
        shape = np.repeat(np.fromiter(row, np.int64), np.fromiter(row.values(), np.int64))
        shapes.append(np.tile(shape, copies))
        row_sizes.append(np.full(copies, len(shape)))
        for size, number in row.items():
            left[size] -= copies * number
            if not left[size]:
                del sizes[bisect_right(sizes, size) - 1]
    offsets = np.concatenate([[0], *row_sizes]).cumsum().astype(np.int64)
    return np.concatenate(shapes) if shapes else np.empty(0, np.int64), offsets


# --- one long text, cut --------------------------------------------------------------------------


def cut_rows(starts: Integers, lengths: Integers, capacity: int, seed: tuple[int, ...] | None) -> RowPlan:
    """Segments stand end to end and are cut every `capacity` inputs: all rows but the last are full."""
    order = np.arange(len(starts)) if seed is None else shuffled(len(starts), *seed, 1)
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    edges = np.arange(0, total, capacity)
    cuts = np.unique(np.concatenate([edges, ends - lengths[order]]))
    owner = np.searchsorted(ends, cuts, side="right")
    document = order[owner]
    first = starts[document] + (cuts - (ends[owner] - lengths[document]))
    plan = RowPlan(np.append(np.searchsorted(cuts, edges), len(cuts)), first, np.diff(np.append(cuts, total)))
    return plan if seed is None else reordered(plan, shuffled(plan.num_rows, *seed, 2))


def reordered(plan: RowPlan, order: Integers) -> RowPlan:
    """The same rows in another order."""
    sizes = np.diff(plan.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    members = np.arange(offsets[-1]) + np.repeat(plan.offsets[order] - offsets[:-1], sizes)
    return RowPlan(offsets, plan.starts[members], plan.lengths[members])


def pieces(starts: Integers, lengths: Integers, capacity: int) -> tuple[Integers, Integers]:
    """Segments longer than `capacity` cut into pieces of at most that, in order."""
    numbers = -(-lengths // capacity)
    owner = np.repeat(np.arange(len(starts)), numbers)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    return starts[owner] + number * capacity, np.minimum(capacity, lengths[owner] - number * capacity)
