"""Whether two models have the same tokens, so that one can learn from the other's distribution. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model."""

    name: str
    rows: int
    """Of its embedding; those behind the last token are padding."""
    tokens: Mapping[str, int] | None = None
    """{token: id}, added ones included; None where they are not known."""
    added: frozenset[str] = frozenset()
    """Those that were added to the tokenizer's own, such as <|im_start|>."""


def read_vocabulary(name: str, rows: int, file: Path) -> Vocabulary:
    """As tokenizer.json has it; without tokens where there is no such file, or one that the run's own reader will complain of."""
    try:
        parsed = json.loads(file.read_bytes())
        own = parsed["model"]["vocab"]
        tokens = dict(own) if isinstance(own, dict) else {entry[0]: number for number, entry in enumerate(own)}
        added = {token["content"]: token["id"] for token in parsed.get("added_tokens") or []}
        return Vocabulary(name, rows, tokens | added, frozenset(added))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return Vocabulary(name, rows)


def vocabulary_problem(student: Vocabulary, teacher: Vocabulary, new: Iterable[str] = ()) -> str | None:
    """A sentence where the teacher's (or reference's) distribution is not over the student's tokens; None where it is, as far as is known.

    A token has the same id in both; only added ones may be absent in one of them. The number of padded rows may differ.
    new: tokens that the run adds to both.
    """
    if student.tokens is None or teacher.tokens is None:
        if student.rows == teacher.rows:
            return None
        return _sentence(
            student,
            teacher,
            f"their embeddings have {student.rows} and {teacher.rows} rows, and not both have a tokenizer.json to compare",
        )
    own = {token: number for token, number in student.tokens.items() if token not in set(new)}
    if found := _another_id(own, teacher.tokens):
        return _sentence(student, teacher, found)
    for one, other, tokens in ((student, teacher, own), (teacher, student, teacher.tokens)):
        absent = [token for token in tokens if token not in one.added and token not in (other.tokens or {})]
        if absent:
            return _sentence(
                student, teacher, f"{len(absent)} tokens of {one.name} are absent there, such as {absent[0]!r}"
            )
    if (last := max(own.values(), default=0)) >= teacher.rows:
        return _sentence(
            student, teacher, f"token {last} lies behind the {teacher.rows} rows of the teacher's embedding"
        )
    return None


def _another_id(own: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    names = {number: token for token, number in other.items()}
    for token, number in own.items():
        if (there := other.get(token, number)) != number:
            return f"{token!r} is token {number} of one and {there} of the other"
        if (name := names.get(number, token)) != token:
            return f"token {number} is {token!r} in one and {name!r} in the other"
    return None


def _sentence(student: Vocabulary, teacher: Vocabulary, reason: str) -> str:
    return (
        f"{teacher.name} has another vocabulary than {student.name}, so their distributions can't be compared: "
        f"{reason}; choose one with the same tokens"
    )
