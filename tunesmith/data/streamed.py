"""Sources that are read as the run goes on: what each step sees is fixed by the seed, and a stop loses nothing.

A source is cut into parts that are read side by side. A part is read in *blocks* of rows; a block is tokenized, packed and
shuffled by itself. So a block depends on (seed, source, part, pass, block) and the place where it begins, and to go on
after a stop it is enough to know where the blocks in use begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tunesmith.configs.data import DataSection
from tunesmith.data.cache import Reading
from tunesmith.data.collate import EMPTY_ROW, TokenRow
from tunesmith.data.documents import RowReader, skipped_text
from tunesmith.data.indexed import apportioned, examples, mixing_weights
from tunesmith.data.named import resolve
from tunesmith.data.packing import shuffled
from tunesmith.data.parts import Cursor, Part, open_parts
from tunesmith.data.report import DataReport, SourceReport
from tunesmith.data.segments import Segments, joined, segments_of
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.units import Units
from tunesmith.errors import UserError

_CYCLE = 1000


@dataclass(frozen=True)
class Counts:
    """What became of the rows before some place."""

    reading: Reading = field(default_factory=Reading)
    used: int = 0
    truncated: int = 0
    tokens: int = 0
    trained: int = 0

    def __add__(self, other: Counts) -> Counts:
        reading = Reading(self.reading.rows + other.reading.rows, dict(self.reading.skipped))
        for reason, one in other.reading.skipped.items():
            reading.skip(reason, one.row, one.place, one.detail, one.count)
        numbers = ("used", "truncated", "tokens", "trained")
        return Counts(reading, *(getattr(self, name) + getattr(other, name) for name in numbers))


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins: its place in the part, its number and pass, the number of its first training row, and what was before it."""

    cursor: Cursor
    number: int = 0
    passed: int = 0
    first: int = 0
    counts: Counts = Counts()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BlockStart:
        counts = state["counts"]
        return cls(**{**state, "counts": Counts(**{**counts, "reading": Reading.from_json(**counts["reading"])})})


class PartStream:
    """The training rows of one part of a source, in order and without end; block after block, pass after pass."""

    def __init__(self, source: StreamedSource, number: int, part: Part):
        self.source, self.number, self.part = source, number, part
        self.history = [BlockStart(part.start)]
        """Beginnings of the blocks read so far, as far back as a stop may need."""
        self._begun: BlockStart | None = None
        self._next = self.history[0]

    def row(self, number: int) -> TokenRow:
        """Training row `number`; going back to before what history knows starts from the part's beginning."""
        begun = self._begun
        if begun is None or number < begun.first:
            known = [start for start in self.history if start.first <= number]
            self.history = known or [BlockStart(self.part.start)]
            begun = self._read(self.history[-1])
        while number >= begun.first + self._plan.num_rows:
            self.history.append(self._next)
            begun = self._read(self._next)
        return self._segments.row(self._plan, number - begun.first)

    def _read(self, start: BlockStart) -> BlockStart:
        """Read the block that begins at `start`, or the first one behind it that holds something to train on; say which."""
        source, passed = self.source, start.passed
        while True:
            rows, cursor = self.part.read(start.cursor, source.block_rows(start.number, self.number))
            segments, counts = source.segments(rows)
            place = (cursor, start.number + 1, start.passed) if cursor else (self.part.start, 0, start.passed + 1)
            behind = BlockStart(*place, start.first, start.counts + counts)
            if len(segments.starts):
                break
            if start.passed > passed + 1:
                skipped = skipped_text(behind.counts.reading)
                raise UserError(f"no row in a part of {source.name} can be used: {skipped or 'it holds none'}")
            start = behind
        seed = None if source.seed is None else (*source.seed, self.number, start.passed, start.number)
        self._segments, self._plan, self._begun = segments, segments.plan(seed), start
        self._next = replace(behind, first=start.first + self._plan.num_rows)
        return start

    def start_of(self, number: int) -> BlockStart:
        """Where the block of training row `number` begins; earlier blocks are forgotten."""
        while len(self.history) > 1 and self.history[1].first <= number:  # the background thread only appends
            self.history.pop(0)
        return self.history[0]

    def start_after(self, number: int) -> BlockStart:
        """Where the first block begins that holds none of the training rows before `number`, as far as they were read (on this rank)."""
        following = self._next  # taken first: the background thread may append it, and set the next
        return next((start for start in (*self.history, following) if start.first >= number), following)

    def resume(self, start: BlockStart, following: BlockStart) -> None:
        """Go on in the block that begins at `start`; behind it, `following` begins."""
        self.history, self._begun, self._next = [start], None, following


class StreamedSource:
    """The parts of a source; its training rows are taken from them in turn."""

    def __init__(
        self,
        data: DataSection,
        tokenizer: Tokenizer,
        max_seq_len: int,
        seed: tuple[int, ...] | None,
        units: Units | None = None,
    ):
        self.name = data.source
        self.data, reading = resolve(data)
        self.max_seq_len, self.seed, self.units = max_seq_len, seed, units
        self.row_capacity = max_seq_len * (units.size if units else 1)
        parts, self.identity = open_parts(self.data)
        self.reader = RowReader(self.data, reading, tokenizer, units)
        first, _ = parts[0].read(parts[0].start, 1)
        if not first:
            raise UserError(f"`{self.name}` holds no rows; check `source` and `split`")
        list(self.reader.tokenize([(0, *first[0])], Reading()))  # a wrong format shows before anything is loaded
        self.streams = [PartStream(self, number, part) for number, part in enumerate(parts)]

    def block_rows(self, block: int, part: int) -> int:
        """Rows of a block. First blocks are of different size, so that not all parts read a new one at the same time."""
        rows = max(1, self.data.shuffle_buffer // len(self.streams))
        return rows if block else max(1, rows * (part + 1) // len(self.streams))

    def segments(self, rows: list[tuple[str, Any]]) -> tuple[Segments, Counts]:
        reading = Reading()
        documents = self.reader.collect([(number, place, row) for number, (place, row) in enumerate(rows)], reading)
        segments = segments_of(documents, self.data, self.max_seq_len, self.units)
        for reason, numbers in segments.dropped.items():
            if len(numbers):
                first = int(documents.rows[numbers[0]])
                reading.skip(reason, first, rows[first][0], count=len(numbers))
        return segments, Counts(
            reading,
            used=segments.used,
            truncated=len(segments.truncated),
            tokens=int(segments.lengths.sum()),
            trained=segments.trained(),
        )

    def row(self, k: int) -> TokenRow:
        return self.streams[k % len(self.streams)].row(k // len(self.streams))

    def taken(self, k: int) -> Iterator[tuple[PartStream, int]]:
        """Each part, and how many of rows 0 to k - 1 came from it."""
        count = len(self.streams)
        return ((stream, (k - number + count - 1) // count) for number, stream in enumerate(self.streams))

    def state(self, k: int) -> list[dict[str, Any]]:
        """Where the parts stand once rows 0 to k - 1 were taken: the beginnings of the block in use and of the one behind it."""
        return [
            {"following": asdict(stream.start_after(number)), "start": asdict(stream.start_of(number))}
            for stream, number in self.taken(k)
        ]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        for stream, starts in zip(self.streams, state):
            stream.resume(BlockStart.from_state(starts["start"]), BlockStart.from_state(starts["following"]))

    def report(self, state: list[dict[str, Any]], share: float) -> SourceReport:
        """What became of the rows of all blocks that were in use up to `state`."""
        read = [BlockStart.from_state(starts["following"]) for starts in state]
        counts = sum((start.counts for start in read), Counts())
        return SourceReport(
            source=self.name,
            rows_read=counts.reading.rows,
            rows_used=counts.used,
            skipped=examples(counts.reading),
            truncated=counts.truncated,
            max_seq_len=self.max_seq_len,
            row_capacity=self.row_capacity,
            tokens=counts.tokens,
            trained_tokens=counts.trained,
            training_rows=sum(start.first for start in read),
            packed=self.data.packed,
            streaming=True,
            share=share,
        )


class StreamedOrder:
    """The rows of each step, of sources that are read as the run goes on. Rows are drawn by weight, equal if none is given."""

    def __init__(
        self,
        sources: Sequence[DataSection],
        tokenizer: Tokenizer,
        max_seq_len: int,
        seed: tuple[int, ...] | None,
        rows_per_step: int,
        units: Units | None = None,
        with_index: bool = False,
    ):
        self.seed, self.rows_per_step = seed, rows_per_step
        self.steps_per_epoch: int | None = None
        self.num_indexed = 0  # whatever `with_index` asks: a token of a stream has no place that is known beforehand
        self.sources = [
            StreamedSource(data, tokenizer, max_seq_len, None if seed is None else (*seed, i), units)
            for i, data in enumerate(sources)
        ]
        self.row_capacity = max(source.row_capacity for source in self.sources)
        self.shares = mixing_weights([data.weight for data in sources], [1] * len(sources))
        self.counts = apportioned(_CYCLE, self.shares)
        packed = [source.data.packed for source in self.sources]
        self.packed = bool(units) or any(source.data.packed and not joined(source.data) for source in self.sources)
        self.width = self.row_capacity if all(packed) else None
        self.fingerprint = [
            [source.identity, source.reader.options(), max_seq_len, data.packed, data.weight, data.shuffle_buffer]
            for source, data in zip(self.sources, sources)
        ]

    def unweighted(self) -> StreamedOrder:
        raise ValueError("a stream has no end: its rows can't all be read beforehand")

    def report(self, state: dict[str, Any]) -> DataReport:
        sources = zip(self.sources, state["parts"], self.shares)
        return DataReport([source.report(parts, share) for source, parts, share in sources])

    def rows(self, epoch: int, step: int, rank: int, ranks: int, most: int | None = None) -> list[TokenRow]:
        """This rank's rows of step `step`, counted from 0 over the whole run, at most `most` over all ranks; the longest first.

        Row j of the run goes to rank j % ranks, so a rank reads (mostly) parts that no other rank reads.
        """
        first = step * self.rows_per_step
        count = self.rows_per_step if most is None else min(most, self.rows_per_step)
        own = [
            self.sources[source].row(k)
            for source, k in (self.draw(j) for j in range(first + rank, first + count, ranks))
        ]
        own += [EMPTY_ROW] * (-(-count // ranks) - len(own))
        return sorted(own, key=len, reverse=True)

    def draw(self, j: int) -> tuple[int, int]:
        """(source, number of the row within it) of row j of the run."""
        if len(self.sources) == 1:
            return 0, j
        cycle, place = divmod(j, _CYCLE)
        order = self._cycle(cycle)
        return int(order[place]), cycle * self.counts[order[place]] + int((order[:place] == order[place]).sum())

    def _cycle(self, number: int) -> np.ndarray:
        """Which source each of the rows of a cycle comes from."""
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        return owners[shuffled(_CYCLE, *(self.seed or (0,)), 7, number)]

    def _taken(self, steps: int) -> list[int]:
        """Rows that `steps` steps took of each source."""
        if len(self.sources) == 1:
            return [steps * self.rows_per_step]
        cycles, rest = divmod(steps * self.rows_per_step, _CYCLE)
        order = self._cycle(cycles)[:rest]
        return [cycles * count + int((order == number).sum()) for number, count in enumerate(self.counts)]

    def state(self, steps: int) -> dict[str, Any]:
        """Where every part stands after `steps` steps."""
        return {"parts": [source.state(k) for source, k in zip(self.sources, self._taken(steps))]}

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of each part the state of the rank that read furthest; what was read ahead of the step is in none of them."""
        of_sources = zip(*(state["parts"] for state in states), strict=True)
        return {"parts": [[max(one, key=_reached) for one in zip(*source, strict=True)] for source in of_sources]}

    def load_state(self, state: dict[str, Any]) -> None:
        for source, parts in zip(self.sources, state.get("parts", [])):
            source.load_state(parts)


def _reached(starts: dict[str, Any]) -> tuple[int, int]:
    """How far a rank came in a part; 0 where it reads none of it."""
    return starts["following"]["first"], starts["start"]["first"]
