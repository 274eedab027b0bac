"""Sources whose rows are all tokenized beforehand: any row of any pass at once. Imports no torch itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.configs.data import ChatData, TextData
from tunesmith.data.cache import Documents, Reading
from tunesmith.data.collate import EMPTY_ROW, TokenRow, padded, token_row
from tunesmith.data.documents import Loaded, load_documents, skipped_text
from tunesmith.data.named import resolve
from tunesmith.data.packing import Integers, RowPlan, cut_rows, packed_rows, pieces, random_keys, single_rows
from tunesmith.data.report import DataReport, SourceReport
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError


def examples(reading: Reading) -> dict[str, tuple[int, str]]:
    """{reason: (rows skipped, an example)}, as a report has them."""
    return {reason: (one.count, one.example) for reason, one in reading.skipped.items()}


def joined(data: ChatData | TextData) -> bool:
    """Whether the documents of a row see each other."""
    return isinstance(data, TextData) and data.packed and not data.mask_documents


class Segments:
    """Which part of which document is trained on, and how it is laid out in rows: what chats and texts differ in."""

    def __init__(self, documents: Documents, data: ChatData | TextData, max_seq_len: int):
        self.documents, self.data, self.capacity = documents, data, max_seq_len
        self.join = joined(data)
        self.truncated = self.unusable = np.empty(0, np.int64)
        if isinstance(data, TextData):
            self.starts, self.lengths = documents.starts, documents.lengths - (0 if self.join else 1)
            if not (data.packed and data.split_across_pack):
                self.starts, self.lengths = pieces(self.starts, self.lengths, self.capacity)
        else:
            self._cut_answers()

    def _cut_answers(self) -> None:
        """Inputs up to the last label within max_seq_len tokens: what comes after has no part in the loss."""
        documents = self.documents
        lasts = np.array(documents.lasts)
        self.truncated = np.flatnonzero(documents.lengths > self.capacity)
        starts = documents.starts
        for number in self.truncated:
            start = int(starts[number])
            trained = np.flatnonzero(documents.mask[start : start + self.capacity])
            lasts[number] = trained[-1] if len(trained) else 0
        self.unusable = np.flatnonzero(lasts == 0)
        kept = lasts > 0
        self.starts, self.lengths = starts[kept], lasts[kept]

    def plan(self, seed: tuple[int, ...] | None) -> RowPlan:
        """The rows of one pass; in the order of the source where `seed` is None."""
        if not self.data.packed:
            return single_rows(self.starts, self.lengths, seed)
        if isinstance(self.data, TextData) and self.data.split_across_pack:
            return cut_rows(self.starts, self.lengths, self.capacity, seed)
        return packed_rows(self.starts, self.lengths, self.capacity, seed)

    def trained(self) -> int:
        """Labels in all segments."""
        starts, mask = self.documents.starts, self.documents.mask
        cut_off = sum(int(mask[starts[n] + self.capacity : self.documents.ends[n]].sum()) for n in self.truncated)
        return int(self.documents.trained.sum()) - cut_off

    def row(self, plan: RowPlan, index: int) -> TokenRow:
        return token_row(self.documents, *plan.row(index), join=self.join)


class IndexedSource:
    """Rows by number, over endless passes: row k is row k % num_rows of pass k // num_rows."""

    def __init__(self, loaded: Loaded, data: ChatData | TextData, max_seq_len: int, seed: tuple[int, ...] | None):
        self.loaded, self.data, self.seed = loaded, data, seed
        self.segments = Segments(loaded.documents, data, max_seq_len)
        if not len(self.segments.starts):
            raise UserError(
                f"no row of `{loaded.name}` can be used: none has an answer within `tokenizer.max_seq_len` = {max_seq_len} tokens"
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
        return self.segments.row(self.plan(number)[0], index)

    def row_length(self, k: int) -> int:
        number, index = divmod(k, self.num_rows)
        return int(self.plan(number)[1][index])

    def report(self, share: float) -> SourceReport:
        segments, documents, rows = self.segments, self.loaded.documents, self.loaded.rows
        reading = documents.reading
        skipped = examples(reading)

        def example(numbers: Integers) -> str:
            return rows.place(int(documents.rows[numbers[0]])) if rows is not None and len(numbers) else ""

        if len(segments.unusable):
            skipped["no answer within max_seq_len"] = (len(segments.unusable), example(segments.unusable))
        used = len(documents.ends) - len(segments.unusable)
        cut = np.setdiff1d(segments.truncated, segments.unusable)
        return SourceReport(
            source=self.loaded.name,
            rows_read=reading.rows,
            rows_used=used,
            skipped=skipped,
            truncated=len(cut),
            truncated_example=example(cut),
            max_seq_len=segments.capacity,
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
    ):
        opened = []
        for number, data in enumerate(sources):
            data, reading = resolve(data)
            loaded = load_documents(data, reading, tokenizer)
            opened.append(IndexedSource(loaded, data, max_seq_len, None if seed is None else (*seed, number)))
        self.sources, self.rows_per_step, self.max_seq_len = opened, rows_per_step, max_seq_len
        self.mixture = Mixture(opened, [data.weight for data in sources] if len(sources) > 1 else [None], seed)
        self.steps_per_epoch = math.ceil(self.mixture.num_rows / rows_per_step)
        self.packed = any(source.data.packed and not source.segments.join for source in opened)
        longest = max(source.longest for source in opened)
        self.width = padded(longest, max_seq_len) if all(source.data.packed for source in opened) else None
        self.fingerprint = [
            [source.loaded.fingerprint, max_seq_len, source.data.packed, data.weight]
            for source, data in zip(opened, sources)
        ]

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
