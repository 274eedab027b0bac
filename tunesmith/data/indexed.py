"""Sources whose rows are all tokenized beforehand: any row of any pass at once. Imports no torch itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.configs.data import DataSection
from tunesmith.data.cache import Reading
from tunesmith.data.collate import EMPTY_ROW, TokenRow, padded
from tunesmith.data.documents import Loaded, load_documents, skipped_text
from tunesmith.data.named import resolve
from tunesmith.data.packing import Integers, RowPlan, random_keys
from tunesmith.data.report import DataReport, SourceReport
from tunesmith.data.segments import NO_ANSWER, SAME, TOO_LONG, segments_of
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.units import Units
from tunesmith.errors import UserError


def examples(reading: Reading) -> dict[str, tuple[int, str]]:
    """{reason: (rows skipped, an example)}, as a report has them."""
    return {reason: (one.count, one.example) for reason, one in reading.skipped.items()}


_NONE = {
    NO_ANSWER: "none has an answer within",
    TOO_LONG: "all are longer than",
    SAME: "chosen equals rejected within",
}


def counted(units: Mapping[str, int]) -> str:
    """{"pairs": 1000} as 1,000 pairs."""
    return ", ".join(f"{number:,} {name}" for name, number in units.items())


class IndexedSource:
    """Rows by number, over endless passes: row k is row k % num_rows of pass k // num_rows."""

    def __init__(
        self,
        loaded: Loaded,
        data: DataSection,
        max_seq_len: int,
        seed: tuple[int, ...] | None,
        units: Units | None = None,
        offset: int | None = None,
    ):
        self.loaded, self.data, self.seed, self.offset = loaded, data, seed, offset
        """`offset`: tokens of the sources before this one, where rows are to have an index."""
        self.segments = segments_of(loaded.documents, data, max_seq_len, units)
        if not len(self.segments.starts):
            reason = next(reason for reason, numbers in self.segments.dropped.items() if len(numbers))
            raise UserError(
                f"no row of `{loaded.name}` can be used: {_NONE[reason]} `tokenizer.max_seq_len` = {max_seq_len} tokens"
                + (f"; {skipped_text(loaded.documents.reading)}" if loaded.documents.reading.skipped else "")
            )
        self.plan = lru_cache(maxsize=2)(self._plan)
        first, lengths = self.plan(0)
        self.num_rows = first.num_rows
        self.longest = int(lengths.max())

    def _plan(self, number: int) -> tuple[RowPlan, Integers]:
        """The rows of a pass, and their lengths."""
        plan = self.segments.plan(None if self.seed is None else (*self.seed, number))
        return plan, plan.row_lengths()

    def row(self, k: int) -> TokenRow:
        number, index = divmod(k, self.num_rows)
        return self.segments.row(self.plan(number)[0], index, self.offset)

    def row_length(self, k: int) -> int:
        number, index = divmod(k, self.num_rows)
        return int(self.plan(number)[1][index])

    def report(self, share: float) -> SourceReport:
        segments, documents, rows = self.segments, self.loaded.documents, self.loaded.rows
        reading = documents.reading
        skipped = examples(reading)

        def example(numbers: Integers) -> str:
            return rows.place(int(documents.rows[numbers[0]])) if rows is not None and len(numbers) else ""

        for reason, numbers in segments.dropped.items():
            if len(numbers):
                skipped[reason] = (len(numbers), example(numbers))
        return SourceReport(
            source=self.loaded.name,
            rows_read=reading.rows,
            rows_used=segments.used,
            skipped=skipped,
            truncated=len(segments.truncated),
            truncated_example=example(segments.truncated),
            units=counted(segments.count()),
            max_seq_len=segments.capacity,
            row_capacity=segments.row_capacity,
            documents=len(segments.starts),
            tokens=int(segments.lengths.sum()),
            trained_tokens=segments.trained(),
            training_rows=self.num_rows,
            packed=self.data.packed,
            from_cache=self.loaded.from_cache,
            share=share,
        )


class Mixture:
    """The rows of an epoch, drawn from several sources.

    An epoch has as many rows as the sources hold together. Without weights each row comes once. With weights a source
    gives that share of the rows: it is passed over again where it is too small, and goes on in the next epoch where it
    left off, so in the long run each of its rows comes equally often.
    """

    def __init__(self, sources: Sequence[IndexedSource], weights: Sequence[float | None], seed: tuple[int, ...] | None):
        self.sources, self.seed = sources, seed
        sizes = np.array([source.num_rows for source in sources])
        self.num_rows = int(sizes.sum())
        self.counts = apportioned(self.num_rows, mixing_weights(weights, sizes.tolist()))
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each row of the epoch, its number within the source)."""
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        within = np.concatenate([np.arange(count) for count in self.counts])
        if self.seed is None:  # evenly spread
            keys = (within + 0.5) / np.asarray(self.counts)[owners]
        else:  # only the order of sources is drawn; each gives its own rows in its own order
            keys = random_keys(self.num_rows, *self.seed, 7, epoch)
        owners = owners[np.argsort(keys, kind="stable")]
        numbers = np.empty(self.num_rows, np.int64)
        numbers[np.argsort(owners, kind="stable")] = within
        return owners, numbers + epoch * np.asarray(self.counts)[owners]

    def draw(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """(source, number of the row within it) of rows start to stop of an epoch, counted from 0."""
        if len(self.sources) == 1:
            return [(0, epoch * self.num_rows + k) for k in range(start, min(stop, self.num_rows))]
        owners, numbers = self.order(epoch)
        return list(zip(owners[start:stop].tolist(), numbers[start:stop].tolist()))


def mixing_weights(weights: Sequence[float | None], sizes: Sequence[int]) -> list[float]:
    """The share of rows of each source; by size where no weight is given."""
    given = [weight is not None for weight in weights]
    if any(given) and not all(given):
        raise UserError(
            "`weight` is set for some sources of the list and not for others: set it for all of them, or for none"
        )
    shares = [float(size if weight is None else weight) for weight, size in zip(weights, sizes)]
    if min(shares) <= 0:
        raise UserError("`weight` must be above 0; leave a source out of the list instead")
    return [share / sum(shares) for share in shares]


def apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `shares` that sum to `total`: largest remainders."""
    exact = [total * share for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class IndexedOrder:
    """The rows of each step, of sources that are tokenized beforehand."""

    steps_per_epoch: int | None

    def __init__(
        self,
        sources: Sequence[Any],
        tokenizer: Tokenizer,
        max_seq_len: int,
        seed: tuple[int, ...] | None,
        rows_per_step: int,
        units: Units | None = None,
        with_index: bool = False,
    ):
        opened: list[IndexedSource] = []
        self.num_indexed = 0
        for number, data in enumerate(sources):
            data, reading = resolve(data)
            loaded = load_documents(data, reading, tokenizer, units)
            of_source = None if seed is None else (*seed, number)
            offset = self.num_indexed if with_index else None
            opened.append(IndexedSource(loaded, data, max_seq_len, of_source, units, offset))
            self.num_indexed += len(loaded.documents.ids) if with_index else 0
        self.sources, self.rows_per_step = opened, rows_per_step
        self.row_capacity = max(source.segments.row_capacity for source in opened)
        self.mixture = Mixture(opened, [data.weight for data in sources] if len(sources) > 1 else [None], seed)
        self.steps_per_epoch = math.ceil(self.mixture.num_rows / rows_per_step)
        self.packed = bool(units) or any(source.data.packed and not source.segments.join for source in opened)
        longest = max(source.longest for source in opened)
        self.width = padded(longest, self.row_capacity) if all(source.data.packed for source in opened) else None
        self.fingerprint = [
            [source.loaded.fingerprint, max_seq_len, source.data.packed, data.weight]
            for source, data in zip(opened, sources)
        ]

    def unweighted(self) -> IndexedOrder:
        order = copy.copy(self)
        order.mixture = Mixture(self.sources, [None] * len(self.sources), None)
        order.steps_per_epoch = math.ceil(order.mixture.num_rows / self.rows_per_step)
        return order

    def report(self, state: dict[str, Any]) -> DataReport:
        counts = self.mixture.counts
        return DataReport([source.report(count / sum(counts)) for source, count in zip(self.sources, counts)])

    def rows(self, epoch: int, step: int, rank: int, ranks: int, most: int | None = None) -> list[TokenRow]:
        """This rank's rows of step `step` (from 0) of an epoch, at most `most` over all ranks; the longest first.

        Rows are dealt out by length, so that ranks and micro-batches hold rows of like length.
        """
        drawn = self.mixture.draw(epoch, step * self.rows_per_step, (step + 1) * self.rows_per_step)[:most]
        drawn.sort(key=lambda row: -self.sources[row[0]].row_length(row[1]))
        own = [self.sources[source].row(k) for source, k in drawn[rank::ranks]]
        return own + [EMPTY_ROW] * (-(-len(drawn) // ranks) - len(own))

    def state(self, steps: int) -> dict[str, Any]:
        return {}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return states[0]

    def load_state(self, state: dict[str, Any]) -> None:
        """Any step is there at once: nothing to do."""
