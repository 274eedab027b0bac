"""Tokenized documents as flat arrays, and their cache on disk: keyed by content, written whole or not at all. Imports no torch."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger(__name__)
_VERSION = 3
_ARRAYS = {
    "ids": np.uint32,
    "mask": np.bool_,
    "ends": np.int64,
    "rows": np.int64,
    "lasts": np.int64,
    "trained": np.int64,
    "values": np.float32,
    "scores": np.int32,
}
_WHOLE = 1 << 26


class Skipped(NamedTuple):
    """Rows that were left out for one reason, and the first of them as an example."""

    count: int
    row: int
    """Number of the example in its source."""
    place: str
    """Where it stands."""
    detail: str = ""
    """What is wrong with it, beyond the reason."""

    @property
    def example(self) -> str:
        return f"{self.place}: {self.detail}" if self.detail else self.place


@dataclass
class Reading:
    """What happened while the rows of a source were read."""

    rows: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """{reason: the rows}."""

    @classmethod
    def from_json(cls, rows: int, skipped: dict[str, list[Any]]) -> Reading:
        return cls(rows, {reason: Skipped(*values) for reason, values in skipped.items()})

    def skip(self, reason: str, row: int, place: str, detail: str = "", count: int = 1) -> None:
        known = self.skipped.get(reason, Skipped(0, row, place, detail))
        self.skipped[reason] = known._replace(count=known.count + count)


@dataclass
class Documents:
    """Tokenized rows, one after the other."""

    ids: np.ndarray
    """(tokens,) all documents end to end."""
    mask: np.ndarray
    """(tokens,) True: in the loss."""
    ends: np.ndarray
    """(documents,) where each document ends in `ids`."""
    rows: np.ndarray
    """(documents,) the row of the source that each came from."""
    lasts: np.ndarray
    """(documents,) the last token in the loss, counted from the start of its document; 0 in scored ones only: nothing predicts the first."""
    trained: np.ndarray
    """(documents,) tokens in the loss."""
    reading: Reading
    values: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """(documents,) what is known of each document: whether it is desirable, its pair's margin, its class; else 0."""
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """(tokens in the mask,) of scored documents: the label of the score that is read at each."""

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], self.ends]).astype(np.int64)[:-1]  # none, where there are no documents

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts


class Tokenized(NamedTuple):
    """One document."""

    row: int
    """Of the source."""
    ids: Sequence[int]
    mask: Sequence[bool] | None = None
    """None: all of it is in the loss."""
    value: float = 0.0
    scores: Sequence[int] | None = None
    """Of a scored document: the label of the score read at each token of the mask."""


class _Writer:
    """Collects documents in the files of a folder, or in memory where `folder` is None."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.files: dict[str, Any] = {
            name: io.BytesIO() if folder is None else (folder / name).open("wb") for name in _ARRAYS
        }
        self.size = 0

    def add(self, documents: Iterable[Tokenized]) -> None:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
        for row, ids, mask, value, scores in documents:
            flags = np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool)
            if scores is None:
                flags[:1] = False
            self.size += len(ids)
            trained = np.flatnonzero(flags)
            kept = (ids, flags, [self.size], [row], trained[-1:], [len(trained)], [value], scores or ())
            for (name, dtype), column in zip(_ARRAYS.items(), kept):
                columns[name].append(np.asarray(column, dtype))
        for name, parts in columns.items():
            if parts:
                self.files[name].write(np.concatenate(parts).tobytes())

    def finish(self, reading: Reading) -> Documents:
        if self.folder is None:
            return Documents(
                **{name: np.frombuffer(self.files[name].getbuffer(), dtype) for name, dtype in _ARRAYS.items()},
                reading=reading,
            )
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        about = {"version": _VERSION, "digests": {name: _digest(self.folder / name) for name in _ARRAYS}}
        (self.folder / "about.json").write_text(json.dumps({**about, "rows": reading.rows, "skipped": reading.skipped}))
        return _open(self.folder)

    def close(self) -> None:
        for file in self.files.values() if self.folder else ():
            file.close()


def collect(batches: Iterable[Iterable[Tokenized]], reading: Reading) -> Documents:
    """Documents held in memory."""
    writer = _Writer(None)
    for batch in batches:
        writer.add(batch)
    return writer.finish(reading)


class _SourceFailed(Exception):
    """Carries an OSError of what is read past the handling of those of the cache."""


def _read_apart(batches: Iterator[Iterable[Tokenized]]) -> Iterator[Iterable[Tokenized]]:
    try:
        yield from batches
    except OSError as error:
        raise _SourceFailed from error


def cached(key: Sequence[Any], make: Callable[[Reading], Iterator[Iterable[Tokenized]]]) -> tuple[Documents, bool]:
    """The documents of `key` from the cache, else made by `make` and written to it; and whether they were in the cache.

    Processes that want the same wait for the first. A cache that can't be written costs a warning, not the run.
    """
    name = hashlib.blake2b(json.dumps([_VERSION, *key], sort_keys=True).encode(), digest_size=20).hexdigest()
    try:
        root = cache_folder()
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{name}.lock"):
            found = _find(root / name)
            return (found, True) if found else (_write(root, name, make), False)
    except _SourceFailed as failed:
        assert failed.__cause__ is not None
        raise failed.__cause__ from None
    except OSError as error:
        logger.warning(
            "tokenized data is kept in memory: the cache %s can't be written (%s); set TUNESMITH_CACHE to a folder that can",
            cache_folder(),
            error.strerror or error,
        )
        reading = Reading()
        return collect(make(reading), reading), False


def cache_folder() -> Path:
    """TUNESMITH_CACHE, or tunesmith/ in the user's cache folder, and there a folder for tokenized rows."""
    root = os.environ.get("TUNESMITH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tunesmith")
    return Path(root).expanduser() / "tokenized"


def _write(root: Path, name: str, make: Callable[[Reading], Iterator[Iterable[Tokenized]]]) -> Documents:
    """Write the documents under a temporary name, then rename the folder."""
    for dead in root.glob(f".{name}.*"):
        shutil.rmtree(dead, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    reading, writer = Reading(), None
    try:
        writer = _Writer(folder)
        for batch in _read_apart(make(reading)):
            writer.add(batch)
        documents = writer.finish(reading)
        os.rename(folder, root / name)
        return documents
    except BaseException:
        if writer:
            writer.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _find(folder: Path) -> Documents | None:
    """The documents in `folder`, if they are whole; a damaged folder is removed."""
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text())
        if about["version"] == _VERSION and all(
            _digest(folder / name) == digest for name, digest in about["digests"].items()
        ):
            return _open(folder)
        damage = "a file is damaged"
    except (OSError, ValueError, KeyError) as error:
        damage = str(error)
    logger.warning("the cache %s is not whole (%s) and is made again", folder, damage)
    shutil.rmtree(folder)
    return None


def _open(folder: Path) -> Documents:
    about = json.loads((folder / "about.json").read_text())
    arrays = {
        name: np.memmap(folder / name, dtype, "r").view(np.ndarray)
        if (folder / name).stat().st_size
        else np.empty(0, dtype)
        for name, dtype in _ARRAYS.items()
    }
    return Documents(
        **arrays,
        reading=Reading.from_json(about["rows"], about["skipped"]),
    )


def _digest(path: Path) -> list[int]:
    """Size and checksum; of files above 64 MiB only 64 blocks spread over the file are read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return [size, zlib.crc32(file.read())]
        total = 0
        for block in range(64):
            file.seek(block * (size - (1 << 20)) // 63)
            total = zlib.crc32(file.read(1 << 20), total)
        return [size, total]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back when the process ends; without one where there is none (Windows, some network drives)."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            logger.debug("no lock on %s: %s", path, error)
        yield
