"""The first row of a source of files, as far as the files' beginnings tell it in a moment. Imports no torch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from tunesmith.configs.data import DataSection, PreferenceData, RewardData, TextData
from tunesmith.data.files import Row, as_row, csv_rows, decode_line, known_kind, opened
from tunesmith.data.formats import FORMATS, Format, Reading, choose_format
from tunesmith.data.sources import choose_split, describe, local_files
from tunesmith.data.splits import SplitPart, parse_split
from tunesmith.errors import UserError

_HEAD = 1 << 20
"""Bytes of a JSON file within which its first row should end."""


def check_rows(data: DataSection, reading: Reading) -> None:
    """Raise UserError where a source has no such split, holds no rows, or its first row fits no format, in the words of the run itself."""
    parts = parse_split(data.split) if data.split else [SplitPart(None)]
    folder = Path(data.source).expanduser()
    if not folder.exists() or (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return  # of the Hub, a pattern, or written by `datasets`
    splits = local_files(data.source)
    files = [file for split in splits.values() for file in split]
    if len(files) == 1 and _first_rows(files[0]) is None:
        return  # a JSON object, whose keys may be splits
    chosen = splits[[choose_split(part.name, splits, data.source) for part in parts][0]]
    found = _first_rows(chosen[0])
    if found == [] and len(chosen) == 1:
        raise UserError(f"{describe(data)} holds no rows; check `source` and `split`")
    if found and not parts[0].start:  # else the first row that counts is another
        place, row = found[0]
        choose_format(row, reading, place, _formats(data))


def _formats(data: DataSection) -> Mapping[str, Format]:
    from tunesmith.data import preference_formats as pairs

    if isinstance(data, TextData):
        return {"text": FORMATS["text"]}
    if isinstance(data, PreferenceData):
        return {"preference": pairs.PREFERENCE, "unpaired": pairs.UNPAIRED}
    if isinstance(data, RewardData):
        return {"preference": pairs.PREFERENCE, "classification": pairs.CLASSIFICATION, "stepwise": pairs.STEPWISE}
    return FORMATS


def _first_rows(path: Path) -> list[tuple[str, Row]] | None:
    """[(where it stands, the first row)], or nothing in the list where there is none; None: the beginning doesn't tell."""
    kind, _ = known_kind(path)
    reader = {"jsonl": _first_line, "csv": _first_values, "json": _first_object}.get(kind)
    return reader(path) if reader else None


def _first_line(path: Path) -> list[tuple[str, Row]]:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}:{number}"
                return [(place, decode_line(line, place))]
    return []


def _first_values(path: Path) -> list[tuple[str, Row]]:
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv_rows(text, path)
        _, header = next(rows, (1, []))
        return [(f"{path}:{line}", dict(zip(header, values))) for line, values in islice(rows, 1)]


def _first_object(path: Path) -> list[tuple[str, Row]] | None:
    """Of a JSON list; None for anything else, and where it is longer than what is looked at, or damaged."""
    with opened(path) as file:
        head = file.read(_HEAD).decode("utf-8-sig", errors="ignore").lstrip()
    if not head.startswith("["):
        return None
    items = head[1:].lstrip()
    if items.startswith("]"):
        return []
    try:
        row, _ = json.JSONDecoder().raw_decode(items)
    except ValueError:
        return None
    return [(f"{path} row 1", as_row(row, f"{path} row 1"))]
