"""What the dataclasses say: the type of each option, its sentence, its default, and the choices of a section."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MISSING = dataclasses.MISSING


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """{option: its type}, without class variables."""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> list[Any]:
    """The alternatives of a union (None left out), or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for member in typing.get_args(hint) if member is not type(None)]
    return [hint]


def optional(hint: Any) -> bool:
    """Whether None is among the alternatives."""
    return type(None) in typing.get_args(hint) and typing.get_origin(hint) in (typing.Union, types.UnionType)


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def has_fixed_type(cls: type) -> bool:
    """Whether `type` is the name of the class among its alternatives, rather than an option."""
    return isinstance(getattr(cls, "type", None), str) and "type" not in hints(cls)


def choices(hint: Any) -> dict[str, type]:
    """{type: class} of a section whose class is chosen by its `type`; empty for any other section."""
    return {m.type: m for m in members(hint) if is_section(m) and has_fixed_type(m)}


def third_party(hint: Any) -> type | None:
    """The class of a choice that takes any dotted path as its `type`."""
    return next((m for m in members(hint) if is_section(m) and {"type", "options"} <= hints(m).keys()), None)


def is_choice(hint: Any) -> bool:
    return bool(choices(hint))


def fields(cls: type) -> list[dataclasses.Field]:
    """The options of a class: required ones first, its own before inherited ones."""
    own = list(vars(cls).get("__annotations__", {}))
    return sorted(dataclasses.fields(cls), key=lambda field: (default_of(field) is not MISSING, field.name not in own))


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field, or MISSING."""
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def default_value(cls: Any, keys: list[str]) -> Any:
    """The default under dotted keys as plain data; KeyError where there is none."""
    for index, key in enumerate(keys):
        if not is_section(cls):
            raise KeyError(key)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if key == "type" and has_fixed_type(cls) and index == len(keys) - 1:
            return cls.type
        value = default_of(fields[key])
        if value is MISSING:
            raise KeyError(key)
        if index == len(keys) - 1:
            return plain(value)
        cls = type(value)
    raise KeyError


def plain(value: Any) -> Any:
    """A config object as dicts, lists and scalars, with the `type` of every chosen section."""
    if is_section(type(value)):
        kind = {"type": value.type} if has_fixed_type(type(value)) else {}
        return kind | {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


# --- sentences -----------------------------------------------------------------------------------


@functools.cache
def _sentences(file: str) -> dict[str, dict[str, str]]:
    """{class: {option: sentence}} of a source file: the string under each field."""
    import ast

    def under(body: list) -> Iterator[tuple[str, str]]:
        for field, text in zip(body, body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                yield field.target.id, " ".join(str(text.value.value).split())

    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: dict(under(node.body)) for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def sentences(cls: type) -> dict[str, str]:
    """{option: its sentence}, inherited ones too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if dataclasses.is_dataclass(base) and file:
            found |= _sentences(file).get(base.__name__, {})
    return found


def summary(cls: type) -> str:
    """The first line of the class's docstring."""
    text = (cls.__doc__ or "").strip().partition("\n")[0]
    return "" if text.startswith(f"{cls.__name__}(") else text  # what dataclass writes where there is none


# --- words ---------------------------------------------------------------------------------------

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


def in_words(hint: Any) -> str:
    """A type as a person would say it."""
    alternatives = [m for m in members(hint)]
    if len(alternatives) > 1 or optional(hint):
        return " or ".join(dict.fromkeys([in_words(m) for m in alternatives] + ["null"] * optional(hint)))
    origin: Any = typing.get_origin(hint)
    args: Any = typing.get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is typing.Literal:
        return "one of " + ", ".join(str(arg) for arg in args) if len(args) > 1 else str(args[0])
    if origin in (list, tuple):
        count = f"{len(args)} " if origin is tuple else ""
        return "a list" if is_section(args[0]) or Ellipsis in args else f"a list of {count}{_plural(args[0])}"
    if origin is dict or hint is dict or is_section(hint):
        return "a section"
    return "any value"


def _plural(hint: Any) -> str:
    return {str: "texts", int: "whole numbers", float: "numbers", bool: "true or false"}.get(hint, "values")
