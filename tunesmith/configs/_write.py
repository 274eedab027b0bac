"""Writes configs: a complete commented YAML file that reads back to the same config, and a JSON Schema for editors."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

from tunesmith.configs import _schema as schema
from tunesmith.configs._check import REQUIRED


def section_lines(config: Any, indent: str = "", sort: bool = False) -> list[str]:
    """The lines of every option of a config object; each carries its sentence."""
    lines: list[str] = []
    comments = schema.sentences(type(config))
    if schema.has_fixed_type(type(config)):
        lines.append(f"{indent}type: {scalar(config.type)}  # {schema.summary(type(config))}")
    fields = schema.fields(type(config))
    for field in sorted(fields, key=lambda field: field.name) if sort else fields:
        lines += option_lines(field.name, getattr(config, field.name), comments.get(field.name, ""), indent, sort)
    return lines


def option_lines(name: str, value: Any, comment: str, indent: str, sort: bool = False) -> list[str]:
    remark = f"  # {comment}" if comment else ""
    if dataclasses.is_dataclass(value):
        return ["", f"{indent}{name}:{remark}", *section_lines(value, indent + "  ", sort)]
    if isinstance(value, list) and value and all(dataclasses.is_dataclass(item) for item in value):
        lines = ["", f"{indent}{name}:{remark}"]
        for item in value:
            first, *rest = [line for line in section_lines(item, indent + "    ", sort) if line]
            lines += [f"{indent}  - {first.lstrip()}", *rest]
        return lines
    if value is REQUIRED:
        return [f"{indent}{name}:  # REQUIRED. {comment}"]
    return [f"{indent}{name}: {flow(value)}{remark}"]


def flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return scalar(value)


_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "~", ".inf", ".nan"}


def scalar(value: Any) -> str:
    """A scalar in YAML that our reader and any other read alike."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    text = str(value).replace("${", "$${")
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not re.match(r"\.\d", text):
        return text
    if text.isascii() and text.isprintable():
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    import yaml

    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).strip()


def _number(value: float) -> str:
    if not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    text = repr(value)
    if "e" in text:  # 2e-05 → 2.0e-5, which YAML 1.1 too reads as a number
        digits, _, power = text.partition("e")
        return f"{digits if '.' in digits else digits + '.0'}e{int(power):+d}"
    return text


# --- JSON Schema ---------------------------------------------------------------------------------


def json_schema(cls: type, recipe: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a recipe's config file, for completion and checks in editors.

    A file that names its recipe can be run by itself and needs all that has no default; one that doesn't is a layer, such
    as an overlay, which others complete.
    """
    definitions: dict[str, Any] = {}
    top = _object(cls, definitions)
    top["properties"] = {"recipe": {"const": recipe, "description": "The recipe this file is for."}} | top["properties"]
    required = top.pop("required", [])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"tune run {recipe}",
        **top,
        "if": {"required": ["recipe"]},
        "then": {"required": required},
        "$defs": definitions,
    }


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, comments = schema.hints(cls), schema.sentences(cls)
    properties: dict[str, Any] = {}
    if schema.has_fixed_type(cls):
        properties["type"] = {"const": cls.type, "description": schema.summary(cls)}
    for field in schema.fields(cls):
        entry = _any_of(hints[field.name], definitions)
        default = schema.default_of(field)
        if comments.get(field.name):
            entry["description"] = comments[field.name]
        if default is not schema.MISSING and not dataclasses.is_dataclass(default):
            entry["default"] = schema.plain(default)
        properties[field.name] = entry
    outside = {"type", "options"} <= hints.keys()
    if outside:
        properties["type"]["pattern"] = r"\."
    made = {
        "type": "object",
        "description": schema.summary(cls),
        "properties": properties,
        "additionalProperties": outside,
    }
    required = [field.name for field in dataclasses.fields(cls) if schema.default_of(field) is schema.MISSING]
    return made | ({"required": required} if required else {})


def _any_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    kinds = [_kind(member, definitions) for member in schema.members(hint)]
    if schema.optional(hint):
        kinds.append({"type": "null"})
    kinds.append({"type": "string", "pattern": r"\$\{[^{}]+\}"})  # ${key}
    texts = any(kind == {"type": "string"} for kind in kinds)
    kinds = kinds[:-1] if texts or {} in kinds else kinds
    return dict(kinds[0]) if len(kinds) == 1 else {"anyOf": kinds}


def _kind(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if schema.is_section(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _any_of(args[0], definitions)}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_any_of(arg, definitions) for arg in args],
            "minItems": len(args),
            "maxItems": len(args),
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": _any_of(args[1], definitions)}
    return {
        str: {"type": "string"},
        Path: {"type": "string"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": "number"},
    }.get(hint, {})
