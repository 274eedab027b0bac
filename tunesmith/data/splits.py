"""Splits and their slices, as `datasets` writes them: train, train[:95%], [10:20], train[:10%]+validation. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.errors import UserError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_PART = re.compile(r"(?P<name>[\w.-]+)?(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitPart:
    """Rows start to stop (in rows, or in percent of all) of the split `name`; None: the default split, the ends."""

    name: str | None
    start: int | None = None
    stop: int | None = None
    percent: bool = False


def known_split(word: str) -> str | None:
    """train, validation or test, if `word` is a name for it."""
    return next((split for split, words in _WORDS.items() if word.lower() in words), None)


def parse_split(text: str) -> list[SplitPart]:
    """The parts that `text` joins by +."""
    return [_parse_part(part.strip(), text) for part in text.split("+")]


def _parse_part(part: str, whole: str) -> SplitPart:
    match = _PART.fullmatch(part)
    if not part or not match:
        raise UserError(
            f"`split: {whole}` is no split; write a name, a slice or both, such as train, [:1000], train[:95%] or train[10:20]"
        )
    bounds = [match["start"], match["stop"]]
    percent = [bound.endswith("%") for bound in bounds if bound]
    if any(percent) and not all(percent):
        raise UserError(f"`split: {whole}` mixes rows and percent in one slice; write both ends the same way")
    start, stop = (int(bound.rstrip("%")) if bound else None for bound in bounds)
    if any(percent) and any(abs(bound) > 100 for bound in (start, stop) if bound is not None):
        raise UserError(f"`split: {whole}` asks for more than 100 %")
    return SplitPart(match["name"], start, stop, any(percent))


def cut(part: SplitPart, num_rows: int) -> tuple[int, int]:
    """First row and the row after the last; percents are rounded to the nearest row, negative bounds count from the end."""

    def absolute(bound: int | None, default: int) -> int:
        if bound is None:
            return default
        rows = round(bound * num_rows / 100) if part.percent else bound
        return min(max(rows + num_rows if rows < 0 else rows, 0), num_rows)

    start, stop = absolute(part.start, 0), absolute(part.stop, num_rows)
    return start, max(start, stop)
