"""Sources read from front to back without holding them: cut into parts that are read side by side, each from any place on. Imports no torch.

How many parts a source has is a matter of the source alone, so what a run sees does not depend on how many ranks read it.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.configs.data import DataSection
from tunesmith.data.files import Row, as_row, csv_rows, decode_line, file_kind, opened, opened_parquet
from tunesmith.data.sources import choose_split, describe, load_hub, local_files, reader_rows
from tunesmith.data.splits import SplitPart, parse_split
from tunesmith.errors import UserError

MOST_PARTS = 8
_CHUNK = 1 << 20

Cursor = list[int]
"""[number of the piece, position in it]."""
Entry = tuple[int, str, Row]
"""(position behind the row, where the row stands, the row)."""


@dataclass(frozen=True)
class Piece:
    """A stretch of rows: `read(position)` yields those from a position on; `start` is the first one's."""

    read: Callable[[int], Iterator[Entry]]
    start: int = 0


class Part:
    """Pieces one after the other, with a cursor; reading on from where it last stopped costs no search."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = pieces
        self._open: tuple[Cursor, Iterator[Entry]] | None = None

    @property
    def start(self) -> Cursor:
        return [0, self.pieces[0].start]

    def read(self, cursor: Cursor, count: int) -> tuple[list[tuple[str, Row]], Cursor | None]:
        """Up to `count` rows from `cursor` on, with their places, and the cursor behind them; None: nothing is left."""
        rows: list[tuple[str, Row]] = []
        number, position = cursor
        while number < len(self.pieces):
            entries = self._entries(number, position)
            for entry in islice(entries, count - len(rows)):
                position = entry[0]
                rows.append(entry[1:])
            if len(rows) == count:
                self._open = ([number, position], entries)
                return rows, [number, position]
            number += 1
            position = self.pieces[number].start if number < len(self.pieces) else 0
        return rows, None

    def _entries(self, number: int, position: int) -> Iterator[Entry]:
        held, self._open = self._open, None
        if held and held[0] == [number, position]:
            return held[1]
        return self.pieces[number].read(position)


def open_parts(data: DataSection) -> tuple[list[Part], list[Any]]:
    """The parts of a source, and what it is known by: names and sizes, not its content.

    Raises UserError when there is no such source or split, and for a slice: a stream has no length.
    """
    splits = parse_split(data.split) if data.split else [SplitPart(None)]
    if any(part.start is not None or part.stop is not None for part in splits):
        raise UserError(
            f"`split: {data.split}`: a stream has no length that a slice could refer to; leave out the slice, or set `streaming: false`"
        )
    if data.reader:
        read = _skipping(
            lambda: ((data.reader or "", row) for row in reader_rows(data.source, data.split, data.reader or ""))
        )
        return [Part([Piece(read)])], [data.reader, data.source, data.split]
    files = local_files(data.source)
    if not files:
        return _hub_parts(data, splits)
    chosen = [path for part in splits for path in files[choose_split(part.name, files, data.source)]]
    sizes = [path.stat().st_size for path in chosen]
    if not sum(sizes):
        raise UserError(f"{describe(data)} holds no rows; check `source` and `split`")
    separator = getattr(data, "document_split", None)
    return _file_parts(chosen, separator), [separator, *([path.name, size] for path, size in zip(chosen, sizes))]


def _file_parts(files: list[Path], separator: str | None) -> list[Part]:
    kinds = {file_kind(path) for path in files}
    if kinds == {("jsonl", "")}:
        return [Part(pieces) for pieces in _line_pieces(files)]
    if kinds == {("parquet", "")}:
        return [Part(pieces) for pieces in _parquet_pieces(files)]
    pieces = [Piece(_skipping(_file_reader(path, separator))) for path in files]
    count = min(MOST_PARTS, len(pieces))
    return [Part(pieces[number::count]) for number in range(count)]


def _skipping(start: Callable[[], Iterator[tuple[str, Row]]]) -> Callable[[int], Iterator[Entry]]:
    """Positions are numbers of rows; what lies before is read and thrown away."""

    def read(position: int) -> Iterator[Entry]:
        for number, (place, row) in enumerate(start()):
            if number >= position:
                yield number + 1, f"{place} row {number + 1}", row

    return read


# --- lines ---------------------------------------------------------------------------------------


def _line_pieces(files: list[Path]) -> list[list[Piece]]:
    """Files of lines, cut into stretches of like size at the ends of lines; positions are bytes."""
    total = sum(path.stat().st_size for path in files)
    count = max(1, min(MOST_PARTS, total // _CHUNK))
    edges = [total * number // count for number in range(1, count)]
    parts: list[list[Piece]] = [[]]
    behind = 0
    for path in files:
        size = path.stat().st_size
        cuts = [0, *(_line_start(path, edge - behind) for edge in edges if behind < edge < behind + size), size]
        for start, stop in zip(cuts, cuts[1:]):
            if start and parts[-1]:
                parts.append([])
            if stop > start:
                parts[-1].append(Piece(_line_reader(path, stop), start))
        behind += size
        if behind in edges:
            parts.append([])
    return [pieces for pieces in parts if pieces]


def _line_start(path: Path, position: int) -> int:
    """The first line that starts at `position` or later."""
    with path.open("rb") as file:
        file.seek(position - 1)
        file.readline()
        return file.tell()


def _line_reader(path: Path, stop: int) -> Callable[[int], Iterator[Entry]]:
    def read(position: int) -> Iterator[Entry]:
        with opened(path) as file:
            file.seek(position)
            while position < stop and (line := file.readline()):
                place = f"{path} at byte {position}"
                position += len(line)
                if line.strip():
                    yield position, place, decode_line(line, place)

    return read


# --- parquet -------------------------------------------------------------------------------------


def _parquet_pieces(files: list[Path]) -> list[list[Piece]]:
    """Row groups, shared out evenly; positions are rows of the file."""
    groups = []
    for path in files:
        with opened_parquet(path) as file:
            metadata = file.metadata
        first = 0
        for number in range(metadata.num_row_groups):
            groups.append(Piece(_group_reader(path, number, first), first))
            first += metadata.row_group(number).num_rows
    count = min(MOST_PARTS, len(groups))
    return [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]


def _group_reader(path: Path, number: int, first: int) -> Callable[[int], Iterator[Entry]]:
    def read(position: int) -> Iterator[Entry]:
        row_number = first
        with opened_parquet(path) as file:
            for batch in file.iter_batches(batch_size=256, row_groups=[number]):
                if row_number + batch.num_rows > position:
                    for row in batch.slice(max(0, position - row_number)).to_pylist():
                        position += 1
                        yield position, f"{path} row {position}", row
                row_number += batch.num_rows

    return read


# --- files that can be read from their start only ------------------------------------------------


def _file_reader(path: Path, separator: str | None) -> Callable[[], Iterator[tuple[str, Row]]]:
    kind, _ = file_kind(path)
    readers = {"jsonl": _lines, "csv": _csv, "json": _json_array, "text": lambda path: _texts(path, separator)}
    if kind is None or kind not in readers:
        raise UserError(
            f"{path}: this kind of file can't be streamed together with the others; set `streaming: false`, or name files of one kind"
        )
    return lambda: ((str(path), row) for row in readers[kind](path))


def _lines(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield decode_line(line, f"{path}:{number}")


def _csv(path: Path) -> Iterator[Row]:
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv_rows(text, path)
        _, header = next(rows, (1, []))
        for _, values in rows:
            yield dict(zip(header, values))


def _chunks(path: Path) -> Iterator[str]:
    """A text file, about a mebibyte at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with opened(path) as file:
        while block := file.read(_CHUNK):
            yield decoder.decode(block)


def _texts(path: Path, separator: str | None) -> Iterator[Row]:
    """The documents between separators; without one, pieces of about a mebibyte that end with a line."""
    held = ""
    for chunk in _chunks(path):
        held += chunk
        *documents, held = held.split(separator) if separator else _at_last_line(held)
        yield from ({"text": document} for document in documents if document.strip())
    if held.strip():
        yield {"text": held}


def _at_last_line(text: str) -> list[str]:
    end = text.rfind("\n") + 1
    return [text[:end], text[end:]] if end else [text]


def _json_array(path: Path) -> Iterator[Row]:
    """The objects of one JSON array, decoded one at a time."""
    decode = json.JSONDecoder().raw_decode
    held, place, number_of_rows = "", 0, 0
    for number, chunk in enumerate(_chunks(path)):
        held, place = held[place:] + chunk, 0
        if not number:
            held = held.lstrip()
            if not held.startswith("["):
                raise UserError(
                    f"{path}: only a JSON array or JSON lines (.jsonl) can be streamed; set `streaming: false`, or convert the file"
                )
            place = 1
        while True:
            while place < len(held) and held[place] in " \t\r\n,":
                place += 1
            if held[place : place + 1] in ("", "]"):
                break
            try:
                row, place = decode(held, place)
            except ValueError:
                break  # the object goes on in the next chunk
            number_of_rows += 1
            yield as_row(row, f"{path} row {number_of_rows}")
    if held[place : place + 1] != "]":
        raise UserError(f"{path}: not JSON, or cut off, near the end of: {held[place : place + 60]!r}; mend the file")


# --- the Hub -------------------------------------------------------------------------------------


def _hub_parts(data: DataSection, splits: list[SplitPart]) -> tuple[list[Part], list[Any]]:
    if len(splits) > 1:
        raise UserError(
            f"`split: {data.split}`: a Hub data set is streamed one split at a time; list the splits as sources of their own"
        )
    split = splits[0].name or "train"
    stream = load_hub(data, split, streaming=True)
    count = min(MOST_PARTS, getattr(stream, "num_shards", 1) or 1)

    def reader(number: int) -> Callable[[int], Iterator[Entry]]:
        def read(position: int) -> Iterator[Entry]:
            shard = stream.shard(count, number) if count > 1 else stream
            for row in shard.skip(position) if position else shard:
                position += 1
                yield position, f"{data.source} {split} (shard {number}) row {position}", row

        return read

    return [Part([Piece(reader(number))]) for number in range(count)], [data.source, data.subset, split, data.revision]
