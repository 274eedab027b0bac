"""Where rows come from: files, folders, Hub data sets and readers, in a fixed order with random access. Imports no torch."""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any

from tunesmith.configs.data import DataSection
from tunesmith.data.files import KINDS, Row, Rows, digest_of, file_kind, first_line, read_file
from tunesmith.data.splits import SplitPart, cut, known_split, parse_split
from tunesmith.errors import UserError, require

# --- several, and parts --------------------------------------------------------------------------


class Joined:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _find(self, index: int) -> tuple[Rows, int]:
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Row:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> str:
        part, inner = self._find(index)
        return part.place(inner)

    def fingerprint(self) -> str:
        return digest_of(*(part.fingerprint() for part in self.parts))


class Sliced:
    """Rows `start` to `stop` of a source."""

    def __init__(self, rows: Rows, start: int, stop: int):
        self.rows, self.start, self.stop = rows, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, index: int) -> Row:
        return self.rows[self.start + index]

    def place(self, index: int) -> str:
        return self.rows.place(self.start + index)

    def fingerprint(self) -> str:
        return digest_of(self.rows.fingerprint(), str(self.start), str(self.stop))


# --- where a source is ---------------------------------------------------------------------------


def open_rows(data: DataSection) -> Rows:
    """The rows that `data.source` and `data.split` name, in their order.

    Raises UserError when there is no such source or split, when it holds no rows, or when a file can't be read.
    """
    parts = parse_split(data.split) if data.split else [SplitPart(None)]
    if data.reader:
        rows: Rows = ReaderRows(data.source, data.split, data.reader)
    elif files := local_files(data.source):
        rows = _local_rows(data, files, parts)
    elif saved := _saved_to_disk(data.source):
        rows = _pick(_saved_splits(saved), parts, data.source)
    else:
        rows = _hub_rows(data, parts)
    if not len(rows):
        raise UserError(f"{describe(data)} holds no rows; check `source` and `split`")
    return rows


def describe(data: DataSection) -> str:
    """The name of a source in messages."""
    return f"`{data.source}`" + (f" (split {data.split})" if data.split else "")


def local_files(source: str) -> dict[str, list[Path]]:
    """{split: files} of a file, folder or glob; empty when `source` is the id of a Hub data set.

    Raises UserError for a path where nothing is.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": [path]}
    if path.is_dir():
        if _saved_to_disk(source):
            return {}
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file, path)]
        if not files:
            raise UserError(f"`{source}` holds no data files; the endings are {', '.join(KINDS)}")
        return by_split(files, path)
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(os.path.expanduser(source), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"no file matches `{source}`; the working directory is {Path.cwd()}")
        return {"train": files}
    if is_hub_id(source):
        return {}
    raise UserError(f"`{source}` is no file, folder or built-in data set{_neighbours(path)}")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name and not that of a data file."""
    return bool(re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source)) and file_kind(Path(source))[0] is None


def by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """{split: files}, judged by the names of files and folders: train.jsonl, test-00000-of-00002.parquet, validation/a.csv.

    Where no name says so, all are train; where some do, any other file is a split by its own name.
    """
    named = {file: _split_of(file.relative_to(root)) for file in files}
    if not any(named.values()):
        return {"train": list(files)}
    splits: dict[str, list[Path]] = {}
    for file, name in named.items():
        splits.setdefault(name or file.name.split(".")[0], []).append(file)
    return splits


def _split_of(path: Path) -> str | None:
    for part in [path.name.split(".")[0], *reversed(path.parts[:-1])]:
        for word in re.split(r"[-_. ]", part.lower()):
            if known := known_split(word):
                return known
    return None


def _is_data(file: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(root).parts)
    described = file.suffix == ".md" or file.name.lower() in ("dataset_info.json", "dataset_infos.json", "license.txt")
    return file_kind(file)[0] is not None and not hidden and not described


def _neighbours(path: Path) -> str:
    from tunesmith.data.named import NAMED

    names = [name.name for name in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, 1)
    if close:
        return f"; did you mean `{path.parent / close[0]}`?"
    close = get_close_matches(str(path), NAMED, 1)
    if close:
        return f"; did you mean the built-in `{close[0]}`?"
    if not path.parent.is_dir():
        return f": there is no folder `{path.parent}`"
    return "; a Hub id has the form owner/name, and `tune ls` shows the built-in names"


def _local_rows(data: DataSection, files: dict[str, list[Path]], parts: list[SplitPart]) -> Rows:
    separator = getattr(data, "document_split", None)
    if len(files) == 1 and len(next(iter(files.values()))) == 1:
        only, (path,) = next(iter(files.items()))
        splits = read_file(path, separator)
        if list(splits) == ["train"] and only != "train":
            splits = {only: splits["train"]}
        return _pick(splits, parts, data.source)
    wanted = [choose_split(part.name, files, data.source) for part in parts]
    opened: dict[str, Rows] = {
        name: Joined([rows for path in files[name] for rows in read_file(path, separator).values()])
        for name in dict.fromkeys(wanted)
    }
    return _pick(
        opened, [SplitPart(name, part.start, part.stop, part.percent) for name, part in zip(wanted, parts)], data.source
    )


def choose_split(name: str | None, splits: Iterable[str], source: str) -> str:
    """The split that `name` means: train by default, or the only one there is."""
    splits = list(splits)
    if name is None:
        name = splits[0] if len(splits) == 1 else "train"
    for known in (name, known_split(name)):
        if known in splits:
            return known
    raise UserError(
        f"`{source}` has no split `{name}`; it has {', '.join(f'`{split}`' for split in splits)}: set `split` to one of them"
    )


def _pick(splits: dict[str, Rows], parts: list[SplitPart], source: str) -> Rows:
    """The parts of the splits that were asked for, joined."""
    picked = []
    for part in parts:
        rows = splits[choose_split(part.name, splits, source)]
        start, stop = cut(part, len(rows))
        picked.append(rows if (start, stop) == (0, len(rows)) else Sliced(rows, start, stop))
    return picked[0] if len(picked) == 1 else Joined(picked)


# --- through `datasets` --------------------------------------------------------------------------


class HubRows:
    """One split of a data set in the memory of `datasets` (Arrow files mapped from its cache)."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self.dataset[int(index)]

    def place(self, index: int) -> str:
        return f"{self.name} row {index + 1}"

    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)


def _saved_to_disk(source: str) -> Path | None:
    """The folder, if `datasets` wrote it with save_to_disk."""
    path = Path(source).expanduser()
    return path if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file() else None


def _saved_splits(path: Path) -> dict[str, Rows]:
    saved = require("datasets", "datasets", f"reading {path}").load_from_disk(str(path))
    found = saved.items() if isinstance(saved, dict) else [("train", saved)]
    return {str(name): HubRows(dataset, f"{path} {name}") for name, dataset in found}


def _hub_rows(data: DataSection, parts: list[SplitPart]) -> Rows:
    loaded: dict[str, Rows] = {}
    for part in parts:
        name = part.name or "train"
        if name not in loaded:
            loaded[name] = HubRows(load_hub(data, name), f"{data.source} {name}")
    return _pick(
        loaded, [SplitPart(part.name or "train", part.start, part.stop, part.percent) for part in parts], data.source
    )


def load_hub(data: DataSection, split: str, streaming: bool = False) -> Any:
    """A split of a Hub data set through `datasets` (its cache, token and offline mode); its errors as UserError."""
    datasets = require("datasets", "datasets", f"the Hub data set {data.source}")
    try:
        return datasets.load_dataset(data.source, data.subset, split=split, streaming=streaming, revision=data.revision)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, RuntimeError) and "script" not in str(error):
            raise
        raise UserError(
            f"the data set `{data.source}` can't be loaded from the Hub ({first_line(error)}); {_advice(error)}"
        ) from error


def _advice(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return "set `revision: refs/convert/parquet` for the copy that needs no script"
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return "offline mode is on and it is not in the cache: download it first, or give a local file"
    if isinstance(error, OSError) and "reach" in str(error):
        return "check `source` and the network, or give a local file"
    return "check `source`, `subset` and `split`, and log in with `hf auth login` where access must be granted"


# --- a reader of the user's ----------------------------------------------------------------------


class ReaderRows:
    """Rows that a function of the user's gave."""

    def __init__(self, source: str, split: str | None, reader: str):
        self.name = reader
        self.rows = list(reader_rows(source, split, reader))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def place(self, index: int) -> str:
        return f"{self.name} row {index + 1}"

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
        return digest.hexdigest()


def reader_rows(source: str, split: str | None, reader: str) -> Iterator[Row]:
    """What `reader`, a dotted path or file.py:function, yields for (source, split)."""
    for number, row in enumerate(_function(reader)(source, split), 1):
        if not isinstance(row, dict):
            raise UserError(
                f"`reader: {reader}` gave {type(row).__name__} as row {number}; it must give dicts of columns"
            )
        yield row


def _function(path: str) -> Any:
    module_name, _, name = path.rpartition(":" if ".py:" in path else ".")
    try:
        if module_name.endswith(".py"):
            file = Path(module_name).expanduser()
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # `tune` is a script: its own folder is on the path, the user's is not
            module = importlib.import_module(module_name)
    except (ModuleNotFoundError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"`reader: {path}` can't be imported ({first_line(error)}); write package.module.function or file.py:function"
        ) from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"`reader: {path}`: {module_name} has no function `{name}`")
    return getattr(module, name)
