"""Rows to tokens: every row of a source as ids and loss mask, bad rows counted with a reason. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.configs.data import DataSection, RewardData, TextData
from tunesmith.data import formats
from tunesmith.data.cache import Documents, Reading, Tokenized, cached, collect
from tunesmith.data.files import Row, Rows, file_digest
from tunesmith.data.formats import BadRow
from tunesmith.data.sources import describe, open_rows
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.units import (
    NOTHING_TRAINED,
    Units,
    choose_units,
    encode_classified,
    encode_pairs_or_answers,
    encode_steps,
    with_mismatched,
)
from tunesmith.errors import UserError

_CHUNK = 512
_CHUNK_CHARACTERS = 1 << 23
NOT_RENDERED = "the chat template can't render it"

NumberedRow = tuple[int, str, Row]
"""Number of a row in its source, where it stands, the row."""


NumberedExample = tuple[int, str, formats.Example]


@dataclass
class RowReader:
    """Tokenizes rows of one source."""

    data: DataSection
    reading: formats.Reading
    tokenizer: Tokenizer
    units: Units | None = None
    """Of preference data: what a row is to become."""
    format: str | None = None
    """Chosen by the first row."""

    def tokenize(self, rows: Iterable[NumberedRow], report: Reading) -> Iterator[list[Tokenized]]:
        """Ids and masks of `rows`, chunk by chunk; rows that can't be used are counted in `report`."""
        chunk: list[NumberedExample] = []
        size = 0
        examples = self._examples(rows, report)
        for item in (
            with_mismatched(examples, not self.data.streaming) if self.units and self.units.mismatched else examples
        ):
            chunk.append(item)
            size += len(item[2].get("text", ""))
            if len(chunk) == _CHUNK or size > _CHUNK_CHARACTERS:
                yield self._encode(chunk, report)
                chunk, size = [], 0
        yield self._encode(chunk, report)

    def _examples(self, rows: Iterable[NumberedRow], report: Reading) -> Iterator[NumberedExample]:
        """The rows that are what their format asks for."""
        known = self.units.formats if self.units else formats.FORMATS
        for number, place, row in rows:
            if self.format is None:
                self.format = self._choose(row, place)
            report.rows += 1
            try:
                example = formats.read_row(row, self.reading, known[self.format])
            except BadRow as bad:
                self._skip(report, bad.reason, number, place, str(bad))
            except KeyError as missing:
                reason = f"no column `{missing.args[0]}`"
                self._skip(report, reason, number, place, reason)
            else:
                yield number, place, example

    def _choose(self, row: Row, place: str) -> str:
        if self.units:
            return choose_units(row, self.reading, place, self.units)
        known = {"text": formats.FORMATS["text"]} if isinstance(self.data, TextData) else formats.FORMATS
        return formats.choose_format(row, self.reading, place, known)

    def collect(self, rows: Iterable[NumberedRow], report: Reading) -> Documents:
        """The documents of a few rows, in memory."""
        return collect(self.tokenize(rows, report), report)

    def _skip(self, report: Reading, reason: str, number: int, place: str, message: str) -> None:
        if self.data.on_bad_row == "error":
            raise UserError(f"{place}: {message}; mend the row, or leave such rows out with `on_bad_row: skip`")
        report.skip(reason, number, place, message.removeprefix(reason).lstrip(": "))

    def _encode(self, chunk: list[tuple[int, str, formats.Example]], report: Reading) -> list[Tokenized]:
        if not chunk:
            return []
        if self.units:
            return list(self._encode_units(chunk, report))
        encoded = self._encode_texts(chunk) if "text" in chunk[0][2] else self._encode_chats(chunk)
        kept: list[Tokenized] = []
        for (number, place, _), result in zip(chunk, encoded):
            if isinstance(result, UserError):
                self._skip(report, NOT_RENDERED, number, place, f"{NOT_RENDERED}: {result}")
            elif any(result[1][1:]) if result[1] is not None else len(result[0]) > 1:
                kept.append(Tokenized(number, *result))
            else:
                self._skip(report, NOTHING_TRAINED, number, place, NOTHING_TRAINED)
        return kept

    def _encode_units(self, chunk: list[NumberedExample], report: Reading) -> Iterator[Tokenized]:
        """The documents of each unit, one after the other: all of them, or none."""
        assert self.units
        examples = [example for _, _, example in chunk]
        if isinstance(self.data, RewardData) and self.units.counted == "steps":
            encoded = encode_steps(examples, self.data.step_separator, self.tokenizer)
        elif isinstance(self.data, RewardData) and self.units.counted == "answers":
            encoded = encode_classified(examples, self.data.label_names, self.tokenizer)
        else:
            encoded = encode_pairs_or_answers(examples, self.units, self.tokenizer)
        for (number, place, _), found in zip(chunk, encoded):
            for unit in found:
                if isinstance(unit, BadRow):
                    self._skip(report, unit.reason, number, place, str(unit))
                elif isinstance(unit, UserError):
                    if type(unit) is UserError:
                        raise unit
                    self._skip(report, NOT_RENDERED, number, place, f"{NOT_RENDERED}: {unit}")
                else:
                    yield from (Tokenized(number, *document) for document in unit)

    def _encode_texts(self, chunk: list[Any]) -> Iterator[Any]:
        """Ids with the tokenizer's own start, and the end-of-text token behind."""
        end = self.tokenizer.eos_id
        for ids in self.tokenizer.encode_batch([example["text"] for _, _, example in chunk]):
            yield (ids if end is None or ids[-1:] == [end] else [*ids, end]), None

    def _encode_chats(self, chunk: list[Any]) -> Iterator[Any]:
        conversations = [example["messages"] for _, _, example in chunk]
        tools = [example["tools"] for _, _, example in chunk]
        train_on_input = getattr(self.data, "train_on_input", False)
        for result in self.tokenizer.encode_chat_batch(conversations, tools, train_on_input=train_on_input):
            if type(result) is UserError:  # not about this conversation: the tokenizer has no template, say
                raise result
            yield result

    def options(self) -> list[Any]:
        """What decides the tokens, besides the rows."""
        options = asdict(self.reading) | {"train_on_input": getattr(self.data, "train_on_input", None)}
        if self.units:
            options["units"] = self.units.name
        if isinstance(self.data, RewardData):
            options |= {"step_separator": self.data.step_separator, "label_names": self.data.label_names}
        return [type(self.data).__name__, options, self.data.on_bad_row, self.tokenizer.fingerprint]


def reading_code() -> list[str]:
    """Changes with the code that reads rows and makes tokens of them: what an older version cached is not taken.

    All of the package counts: a list of the modules that matter would one day lack one.
    """
    return [file_digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))]


@dataclass
class Loaded:
    """A source, tokenized."""

    name: str
    rows: Rows | None
    documents: Documents
    fingerprint: str
    from_cache: bool


def numbered(rows: Rows) -> Iterator[NumberedRow]:
    for index in range(len(rows)):
        yield index, rows.place(index), rows[index]


def load_documents(
    data: DataSection, reading: formats.Reading, tokenizer: Tokenizer, units: Units | None = None
) -> Loaded:
    """All rows of a source, tokenized; from the cache where they were tokenized before.

    Raises UserError when no row can be used.
    """
    rows = open_rows(data)
    reader = RowReader(data, reading, tokenizer, units)
    key = [rows.fingerprint(), *reader.options()]
    documents, found = cached([*key, *reading_code()], lambda report: reader.tokenize(numbered(rows), report))
    if found:  # perhaps of another file with the same content
        skipped = documents.reading.skipped
        skipped.update({reason: one._replace(place=rows.place(one.row)) for reason, one in skipped.items()})
    if not len(documents.ends):
        raise UserError(f"no row of {describe(data)} can be used: {skipped_text(documents.reading)}")
    fingerprint = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
    return Loaded(data.source, rows, documents, fingerprint, found)


def skipped_text(reading: Reading) -> str:
    """Why rows were left out, with an example each."""
    return "; ".join(
        f"{one.count:,} of {reading.rows:,} skipped: {reason} ({one.example})"
        for reason, one in reading.skipped.items()
    )
