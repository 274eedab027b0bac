"""Names in weight files and names in the model: declared once, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rename:
    """A tensor that files call otherwise; * stands for any piece of a name, the same on both sides."""

    file: str
    model: str


@dataclass(frozen=True)
class Alias:
    """Another name that some files use for a tensor: understood, never written."""

    file: str
    model: str


@dataclass(frozen=True)
class Drop:
    """Tensors of some files that the model doesn't need."""

    file: str


Operator = Rename | Alias | Drop

ROTARY_BUFFERS = (Drop("*rotary_emb.inv_freq"),)
"""Older files carry the rotary frequencies, which follow from the config."""


def model_name(operators: Iterable[Operator], file_name: str) -> str | None:
    """The model's name of a tensor in a file; None where the tensor isn't needed. Operators apply one after another."""
    name = file_name
    for operator in operators:
        if (found := _match(operator.file, name)) is not None:
            if isinstance(operator, Drop):
                return None
            name = _fill(operator.model, found)
    return name


def file_name(operators: Iterable[Operator], model_name: str) -> str:
    """The name under which a tensor of the model is written."""
    name = model_name
    for operator in reversed(tuple(operators)):
        if isinstance(operator, Rename) and (found := _match(operator.model, name)) is not None:
            name = _fill(operator.file, found)
    return name


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    found = re.fullmatch("(.*)".join(re.escape(piece) for piece in pattern.split("*")), name)
    return None if found is None else found.groups()


def _fill(pattern: str, pieces: tuple[str, ...]) -> str:
    remaining = iter(pieces)
    return re.sub(r"\*", lambda _: next(remaining), pattern)
