"""Which part of which document is trained on, and in which row it stands. Imports no torch itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tunesmith.configs.data import DataSection, TextData
from tunesmith.data.cache import Documents
from tunesmith.data.collate import TokenRow, scored_row, token_row
from tunesmith.data.packing import Integers, RowPlan, cut_rows, packed_rows, pieces, single_rows
from tunesmith.data.units import Units

NO_ANSWER = "no answer within max_seq_len"
TOO_LONG = "longer than max_seq_len"
SAME = "chosen equals rejected within max_seq_len"


def joined(data: DataSection) -> bool:
    """Whether the documents of a row see each other."""
    return isinstance(data, TextData) and data.packed and not data.mask_documents


class Segments:
    """Which part of which document is trained on, and how it is laid out in rows: what chats and texts differ in."""

    def __init__(self, documents: Documents, data: DataSection, max_seq_len: int):
        self.documents, self.data, self.capacity = documents, data, max_seq_len
        self.row_capacity = max_seq_len
        """Inputs that a row holds at most."""
        self.join = joined(data)
        self.truncated = np.empty(0, np.int64)
        """Documents that are cut."""
        self.dropped: dict[str, Integers] = {}
        """{why: documents that are left out for it; of a unit the first}."""
        self._lay_out()

    def _lay_out(self) -> None:
        documents, data = self.documents, self.data
        if isinstance(data, TextData):
            self.starts, self.lengths = documents.starts, documents.lengths - (0 if self.join else 1)
            if not (data.packed and data.split_across_pack):
                self.starts, self.lengths = pieces(self.starts, self.lengths, self.capacity)
        else:
            self._cut_answers()

    def _cut_answers(self) -> None:
        """Inputs up to the last label within max_seq_len tokens: what comes after has no part in the loss."""
        lasts, cut = self._lasts()
        self.dropped[NO_ANSWER] = np.flatnonzero(lasts <= 0)
        self.truncated = cut[lasts[cut] > 0]
        self.starts, self.lengths = self.documents.starts[lasts > 0], lasts[lasts > 0]

    def _lasts(self) -> tuple[Integers, Integers]:
        """(the last token of each document in the loss and within max_seq_len, -1 for none; which documents are longer)."""
        documents = self.documents
        lasts, starts = np.array(documents.lasts), documents.starts
        long = np.flatnonzero(documents.lengths > self.capacity)
        for number in long:
            start = int(starts[number])
            trained = np.flatnonzero(documents.mask[start : start + self.capacity])
            lasts[number] = trained[-1] if len(trained) else -1
        return lasts, long

    def count(self) -> dict[str, int]:
        """Units of preference data in one pass, by what they are."""
        return {}

    @property
    def used(self) -> int:
        """Rows of the source that are trained on."""
        return len(self.documents.ends) - sum(map(len, self.dropped.values()))

    def plan(self, seed: tuple[int, ...] | None) -> RowPlan:
        """The rows of one pass; in the order of the source where `seed` is None."""
        if not self.data.packed:
            return single_rows(self.starts, self.lengths, seed)
        if isinstance(self.data, TextData) and self.data.split_across_pack:
            return cut_rows(self.starts, self.lengths, self.capacity, seed)
        return packed_rows(self.starts, self.lengths, self.capacity, seed)

    def trained(self) -> int:
        """Labels in all segments."""
        trained = self.documents.trained
        left_out = sum(int(trained[numbers].sum()) for numbers in self.dropped.values())
        return int(trained.sum()) - left_out - self._cut_off()

    def _cut_off(self) -> int:
        """Labels behind max_seq_len."""
        starts, ends, mask = self.documents.starts, self.documents.ends, self.documents.mask
        return sum(int(mask[starts[number] + self.capacity : ends[number]].sum()) for number in self.truncated)

    def row(self, plan: RowPlan, index: int, offset: int | None = None) -> TokenRow:
        """Row `index` of a pass; with `offset` (the tokens of the sources before this) also its index."""
        return token_row(self.documents, *plan.row(index), join=self.join, offset=offset)


class UnitSegments(Segments):
    """The same of preference data, whose documents come in units that share a row."""

    def __init__(self, documents: Documents, data: DataSection, max_seq_len: int, units: Units):
        self.units = units
        super().__init__(documents, data, max_seq_len)
        self.row_capacity = units.size * max_seq_len

    def _lay_out(self) -> None:
        documents, size = self.documents, self.units.size
        self.lasts, long = self._lasts()
        lengths = self.lasts + 1 if self.units.scored else self.lasts
        usable = self._all_of_unit(lengths > 0)
        if not self.units.cut:
            short = self._all_of_unit(documents.lengths <= self.capacity)
            self.dropped[TOO_LONG] = size * np.flatnonzero(~short)
            usable = short
        else:
            self.dropped[NO_ANSWER] = size * np.flatnonzero(~usable)
            if self.units.counted == "pairs":
                same = self._same(np.unique(long // size), usable)
                self.dropped[SAME] = size * same
                usable[same] = False
        kept = np.repeat(usable, size)
        self.numbers = np.flatnonzero(kept)
        """Of the documents that are kept."""
        self.starts, self.lengths = documents.starts[kept], lengths[kept]
        self.truncated = long[kept[long]]
        self.lengths_of_units = self.lengths.reshape(-1, size).sum(1)
        self.marks = np.flatnonzero(documents.mask) if self.units.scored else np.empty(0, np.int64)

    def _all_of_unit(self, holds: np.ndarray) -> np.ndarray:
        return np.all(holds.reshape(-1, self.units.size), axis=1)

    def _same(self, long: Integers, usable: np.ndarray) -> Integers:
        """Of the pairs `long`, which hold a document that is cut, those that differ behind the cut only."""
        documents, starts = self.documents, self.documents.starts

        def seen(number: int) -> np.ndarray:
            return documents.ids[starts[number] : starts[number] + self.lasts[number] + 1]

        same = [pair for pair in long if usable[pair] and np.array_equal(seen(2 * pair), seen(2 * pair + 1))]
        return np.array(same, np.int64)

    def count(self) -> dict[str, int]:
        if self.units.counted == "steps":
            return {"steps": self.trained()}
        return {self.units.counted: len(self.lengths_of_units)}

    @property
    def used(self) -> int:
        return len(np.unique(self.documents.rows[self.numbers]))

    def plan(self, seed: tuple[int, ...] | None) -> RowPlan:
        """The rows of one pass, whose segments are the numbers of units."""
        numbers = np.arange(len(self.lengths_of_units))
        if not self.data.packed:
            return single_rows(numbers, self.lengths_of_units, seed)
        return packed_rows(numbers, self.lengths_of_units, self.row_capacity, seed)

    def trained(self) -> int:
        return int(self.documents.trained[self.numbers].sum()) - self._cut_off()

    def row(self, plan: RowPlan, index: int, offset: int | None = None) -> TokenRow:
        numbers, _ = plan.row(index)
        size = self.units.size
        members = (numbers[:, None] * size + np.arange(size)).ravel()
        starts, lengths = self.starts[members], self.lengths[members]
        if self.units.scored:
            row = scored_row(self.documents, self.marks, starts, lengths, offset)
        else:
            row = token_row(self.documents, starts, lengths, offset=offset)
        return replace(row, values=self.documents.values[self.numbers[members]])


def segments_of(documents: Documents, data: DataSection, max_seq_len: int, units: Units | None) -> Segments:
    """The segments of documents, which come in `units` or are chats or texts."""
    return UnitSegments(documents, data, max_seq_len, units) if units else Segments(documents, data, max_seq_len)
