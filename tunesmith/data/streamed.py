"""Sources that are read as the run goes on: what each step sees is fixed by the seed, and a stop loses nothing.

A source is cut into parts that are read side by side. A part is read in *blocks* of rows; a block is tokenized, packed and
shuffled by itself. So a block depends on (seed, source, part, pass, block) and the place where it begins, and to go on
after a stop it is enough to know where the blocks in use begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.configs.data import ChatData, TextData
from tunesmith.data.cache import Reading
from tunesmith.data.collate import TokenRow
from tunesmith.data.documents import RowReader, skipped_text
from tunesmith.data.indexed import Segments, apportioned, joined, mixing_weights
from tunesmith.data.named import resolve
from tunesmith.data.packing import shuffled
from tunesmith.data.parts import Cursor, Part, open_parts
from tunesmith.data.report import DataReport, SourceReport
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError

_CYCLE = 1000


@dataclass(frozen=True)
class BlockStart:
    """Where a block begins: its number and pass, its place in the part, and the number of its first training row."""

    cursor: Cursor
    number: int = 0
    passed: int = 0
    first: int = 0


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
            segments = source.segments(rows)
            behind = (
                BlockStart(cursor, start.number + 1, start.passed)
                if cursor
                else BlockStart(self.part.start, 0, start.passed + 1)
            )
            if len(segments.starts):
                break
            if start.passed > passed + 1:
                raise UserError(
                    f"no row in a part of {source.name} can be used: {skipped_text(source.reading) or 'it holds none'}"
                )
            start = BlockStart(behind.cursor, behind.number, behind.passed, start.first)
        seed = None if source.seed is None else (*source.seed, self.number, start.passed, start.number)
        self._segments, self._plan, self._begun = segments, segments.plan(seed), start
        self._next = BlockStart(behind.cursor, behind.number, behind.passed, start.first + self._plan.num_rows)
        source.training_rows += self._plan.num_rows
        return start

    def start_of(self, number: int) -> BlockStart:
        """Where the block of training row `number` begins; earlier blocks are forgotten."""
        while len(self.history) > 1 and self.history[1].first <= number:  # the background thread only appends
            self.history.pop(0)
        return self.history[0]


class StreamedSource:
    """The parts of a source; its training rows are taken from them in turn."""

    def __init__(self, data: ChatData | TextData, tokenizer: Tokenizer, max_seq_len: int, seed: tuple[int, ...] | None):
        self.name = data.source
        self.data, reading = resolve(data)
        self.max_seq_len, self.seed = max_seq_len, seed
        parts, self.identity = open_parts(self.data)
        self.reader = RowReader(self.data, reading, tokenizer)
        self.reading = Reading()
        self.truncated = self.used = self.tokens = self.trained = self.training_rows = 0
        first, _ = parts[0].read(parts[0].start, 1)
        if not first:
            raise UserError(f"`{self.name}` holds no rows; check `source` and `split`")
        list(self.reader.tokenize([(0, *first[0])], Reading()))  # a wrong format shows before anything is loaded
        self.streams = [PartStream(self, number, part) for number, part in enumerate(parts)]

    def block_rows(self, block: int, part: int) -> int:
        """Rows of a block. First blocks are of different size, so that not all parts read a new one at the same time."""
        rows = max(1, self.data.shuffle_buffer // len(self.streams))
        return rows if block else max(1, rows * (part + 1) // len(self.streams))

    def segments(self, rows: list[tuple[str, Any]]) -> Segments:
        documents = self.reader.collect(
            [(number, place, row) for number, (place, row) in enumerate(rows)], self.reading
        )
        segments = Segments(documents, self.data, self.max_seq_len)
        if len(segments.unusable):
            place = rows[int(documents.rows[segments.unusable[0]])][0]
            self.reading.skip("no answer within max_seq_len", place, len(segments.unusable))
        self.truncated += len(segments.truncated) - len(segments.unusable)
        self.used += len(documents.ends) - len(segments.unusable)
        self.tokens += int(segments.lengths.sum())
        self.trained += segments.trained()
        return segments

    def row(self, k: int) -> TokenRow:
        return self.streams[k % len(self.streams)].row(k // len(self.streams))

    def state(self, k: int) -> dict[str, Any]:
        """Where the parts stand once rows 0 to k - 1 were taken."""
        count = len(self.streams)
        starts = {
            number: stream.start_of((k - number + count - 1) // count) for number, stream in enumerate(self.streams)
        }
        return {str(number): asdict(start) for number, start in starts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for number, start in state.items():
            stream = PartStream(self, int(number), self.streams[int(number)].part)
            stream.history = [BlockStart(**start)]
            self.streams[int(number)] = stream

    def report(self, share: float) -> SourceReport:
        return SourceReport(
            source=self.name,
            rows_read=self.reading.rows,
            rows_used=self.used,
            skipped=dict(self.reading.skipped),
            truncated=self.truncated,
            max_seq_len=self.max_seq_len,
            tokens=self.tokens,
            trained_tokens=self.trained,
            training_rows=self.training_rows,
            packed=self.data.packed,
            streaming=True,
            share=share,
        )


class StreamedOrder:
    """The rows of each step, of sources that are read as the run goes on. Rows are drawn by weight, equal if none is given."""

    def __init__(
        self,
        sources: Sequence[ChatData | TextData],
        tokenizer: Tokenizer,
        max_seq_len: int,
        seed: tuple[int, ...] | None,
        rows_per_step: int,
    ):
        self.seed, self.rows_per_step, self.max_seq_len = seed, rows_per_step, max_seq_len
        self.steps_per_epoch: int | None = None
        self.sources = [
            StreamedSource(data, tokenizer, max_seq_len, None if seed is None else (*seed, i))
            for i, data in enumerate(sources)
        ]
        self.shares = mixing_weights([data.weight for data in sources], [1] * len(sources))
        self.counts = apportioned(_CYCLE, self.shares)
        packed = [source.data.packed for source in self.sources]
        self.packed = any(source.data.packed and not joined(source.data) for source in self.sources)
        self.width = max_seq_len if all(packed) else None
        self.fingerprint = [
            [source.identity, source.reader.options(), max_seq_len, data.packed, data.weight, data.shuffle_buffer]
            for source, data in zip(self.sources, sources)
        ]

    @property
    def report(self) -> DataReport:
        return DataReport([source.report(share) for source, share in zip(self.sources, self.shares)])

    def rows(self, epoch: int, step: int, rank: int, ranks: int) -> list[TokenRow]:
        """This rank's rows of step `step`, counted from 0 over the whole run; the longest first.

        Row j of the run goes to rank j % ranks, so a rank reads (mostly) parts that no other rank reads.
        """
        first = step * self.rows_per_step
        own = [
            self.sources[source].row(k)
            for source, k in (self.draw(j) for j in range(first + rank, first + self.rows_per_step, ranks))
        ]
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

    def state(self, steps: int) -> dict[str, Any]:
        """Where every part stands after `steps` steps."""
        taken = [0] * len(self.sources)
        cycles, rest = divmod(steps * self.rows_per_step, _CYCLE)
        if len(self.sources) == 1:
            taken = [steps * self.rows_per_step]
        else:
            order = self._cycle(cycles)[:rest]
            taken = [cycles * count + int((order == number).sum()) for number, count in enumerate(self.counts)]
        return {"parts": [source.state(k) for source, k in zip(self.sources, taken)]}

    def load_state(self, state: dict[str, Any]) -> None:
        for source, parts in zip(self.sources, state.get("parts", [])):
            source.load_state(parts)
