"""Rows of one data file: json, jsonl, csv, parquet, text. Imports no torch."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import mmap
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.data.splits import known_split
from tunesmith.errors import UserError, require

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""Endings of data files; each but parquet also with .gz, .bz2 or .xz behind it."""


class Rows(Protocol):
    """Rows in a fixed order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """Where row `index` stands, for a person: file and line, or file and row."""
        ...

    def fingerprint(self) -> str:
        """Changes with the rows: with the bytes they come from, and with which of them are taken and how they are read."""
        ...


def file_kind(path: Path) -> tuple[str | None, str]:
    """(jsonl, json, csv, parquet, text or None, ending of the compression or "")."""
    packing = path.suffix if path.suffix in OPENERS else ""
    return KINDS.get(Path(path.stem).suffix if packing else path.suffix), packing


def known_kind(path: Path) -> tuple[str, str]:
    """The same; raises UserError for a file of a kind that is not read."""
    kind, packing = file_kind(path)
    if kind is None:
        raise UserError(
            f"{path}: not a kind of data file we read; the endings are {', '.join(KINDS)} (all but parquet also with {', '.join(OPENERS)})"
        )
    return kind, packing


def file_digest(path: Path) -> str:
    """A hash of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_of(*parts: str) -> str:
    """One hash of several."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


class JsonLines:
    """One JSON object a line; the file stays on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.data = _bytes(path)
        self.starts, self.numbers = _line_starts(self.data)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = self.numbers[index]
        line = self.data[self.starts[number] : self.starts[number + 1]]
        return decode_line(line, f"{self.path}:{number + 1}")

    def place(self, index: int) -> str:
        return f"{self.path}:{self.numbers[index] + 1}"

    def fingerprint(self) -> str:
        return digest_of(file_digest(self.path), "jsonl")


def decode_line(line: bytes, place: str) -> Row:
    """A line of JSON as a row; raises UserError with its place."""
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8"
        ) from None
    except ValueError as error:
        raise UserError(f"{place}: not a JSON object ({error}); mend or remove this line") from None
    return as_row(row, place)


def as_row(value: Any, place: str) -> Row:
    """`value`, where it is a row; raises UserError with its place."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: {type(value).__name__} where an object with columns was expected; mend or remove it")
    return value


def _bytes(path: Path) -> Any:
    """The content of a file, mapped into memory where it is not compressed."""
    if path.suffix in OPENERS:
        return read_whole(path)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


@contextmanager
def explained(path: Path, *signs_of_damage: type[Exception]) -> Iterator[None]:
    """What goes wrong while `path` is opened, read, decompressed or decoded, as UserError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError, *signs_of_damage) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of gzip, bz2 or pyarrow
            raise UserError(f"{path}: can't be read ({error.strerror})") from None
        raise UserError(f"{path}: damaged or incomplete ({first_line(error)}); get the file again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The bytes of a file, decompressed; what goes wrong with it within the block is `explained`."""
    with explained(path), OPENERS.get(path.suffix, open)(path, "rb") as file:
        yield file


@contextmanager
def opened_parquet(path: Path, **options: Any) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what goes wrong with it within the block is `explained`."""
    parquet = require("pyarrow.parquet", "parquet", f"reading {path}")
    arrow_error = require("pyarrow", "parquet", f"reading {path}").ArrowException
    with explained(path, ValueError, arrow_error), parquet.ParquetFile(path, **options) as file:
        yield file


def read_whole(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    try:
        return read_whole(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _line_starts(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """(start of every line and the end, numbers of the lines that are not blank)."""
    import numpy as np  # late: `tune validate` looks at first rows, and must not wait for it

    ends, size, step = [], len(data), 1 << 24
    for start in range(0, size, step):
        block = np.frombuffer(data[start : start + step], np.uint8)
        ends.append(np.flatnonzero(block == 10) + start + 1)
    starts = np.concatenate([[0], *ends]).astype(np.int64)
    if starts[-1] != size:
        starts = np.append(starts, size)
    lengths = np.diff(starts)
    first_bytes = np.frombuffer(data, np.uint8)[starts[:-1]] if size else np.empty(0, np.uint8)
    perhaps = np.flatnonzero(np.isin(first_bytes, np.frombuffer(b" \t\n\r\v\f", np.uint8)))
    blank = [i for i in perhaps if not data[starts[i] : starts[i + 1]].strip()]
    return starts, np.delete(np.arange(len(lengths)), blank)


class Records:
    """Rows held in memory, of a file of type json, csv or text.

    part: which part of the file they are and how it was read, as text: the same bytes can give other rows.
    """

    def __init__(
        self,
        path: Path,
        part: Sequence[str],
        rows: Sequence[Any],
        columns: Sequence[str] | None = None,
        lines: Sequence[int] | None = None,
    ):
        self.path, self.part, self.rows, self.columns, self.lines = path, part, rows, columns, lines

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        if self.columns is not None:
            return dict(zip(self.columns, row))
        return as_row(row, self.place(index))

    def place(self, index: int) -> str:
        return f"{self.path}:{self.lines[index]}" if self.lines else f"{self.path} row {index + 1}"

    def fingerprint(self) -> str:
        return digest_of(file_digest(self.path), *self.part)


def read_json(path: Path) -> dict[str, Rows]:
    """A JSON file: a list of objects, an object of such lists (its keys are splits), or one object a line."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip() and error.msg == "Extra data":
            return {"train": JsonLines(path)}
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); mend the file") from None
    if isinstance(value, list):
        return {"train": Records(path, ["json"], value)}
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in value.values())
    ):
        if len(value) == 1 and not known_split(next(iter(value))):
            return {"train": Records(path, ["json"], next(iter(value.values())))}
        return {name: Records(path, ["json", name], rows) for name, rows in value.items()}
    if isinstance(value, dict):
        return {"train": Records(path, ["json"], [value])}
    raise UserError(f"{path}: holds a JSON {type(value).__name__}; a list of objects, or one object a line, is needed")


def csv_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of a CSV or TSV file, the header first; raises UserError where a row has not as many values as the header."""
    csv.field_size_limit(1 << 30)  # texts are longer than the default 131072
    reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
    header = None
    line = 1
    try:
        for values in reader:
            if values and header is not None and len(values) != len(header):
                raise UserError(
                    f"{path}:{line}: {len(values)} values where the header has {len(header)} columns ({', '.join(header)}); quote values that hold a comma or a line break"
                )
            if values:
                header = header or values
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: not CSV ({error}); quote values that hold a comma, a quote or a line break"
        ) from None


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","


def read_csv(path: Path) -> Rows:
    # str.splitlines() would also end a line at U+2028, U+0085, \v, \f and \x1c, which are text in a CSV file
    rows = list(csv_rows(io.StringIO(read_text(path), newline=""), path))
    columns = rows[0][1] if rows else []
    part = ["csv", _delimiter(path)]
    return Records(path, part, [values for _, values in rows[1:]], columns, [line for line, _ in rows[1:]])


class Parquet:
    """A parquet file, one row group in memory at a time."""

    def __init__(self, path: Path):
        self.path = path
        with opened_parquet(path) as file:
            self.metadata = file.metadata
            sizes = [self.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.ends = list(accumulate(sizes))
        self.group: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        number = bisect_right(self.ends, index)
        if number != self.group[0]:
            with opened_parquet(self.path, memory_map=True, metadata=self.metadata) as file:
                self.group = (number, file.read_row_group(number).to_pylist())
        return self.group[1][index - (self.ends[number - 1] if number else 0)]

    def place(self, index: int) -> str:
        return f"{self.path} row {index + 1}"

    def fingerprint(self) -> str:
        return digest_of(file_digest(self.path), "parquet")


def read_documents(path: Path, separator: str | None) -> Rows:
    """A text file as rows of one column, text: the whole file, or its parts between `separator`."""
    text = read_text(path)
    parts = text.split(separator) if separator else [text]
    return Records(path, ["text", separator or ""], [{"text": part} for part in parts if part.strip()])


def read_file(path: Path, separator: str | None = None) -> dict[str, Rows]:
    """{split: rows} of one data file; its only split is train unless it says otherwise."""
    kind, _ = known_kind(path)
    with explained(path):
        if kind == "json":
            return read_json(path)
        if kind == "text":
            return {"train": read_documents(path, separator)}
        return {"train": {"jsonl": JsonLines, "csv": read_csv, "parquet": Parquet}[kind](path)}


def first_line(error: Exception) -> str:
    """The beginning of another library's message."""
    return str(error).strip().partition("\n")[0][:200].rstrip(".")
