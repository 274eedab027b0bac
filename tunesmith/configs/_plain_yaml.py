"""The plain part of YAML: nested `key: value` lines, as configs mostly are. Read here, because to import PyYAML takes longer than all else that
a quick verb does. Whatever goes beyond it (lists, anchors, mistakes, …) is None here, and PyYAML's to read or to refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

WORD = r"[A-Za-z_./][A-Za-z0-9_./+-]*"
"""Text that needs no quotes, unless it is special."""
SPECIAL = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n", "~", ".inf", ".nan"}
_CONSTANTS = {"null": None, "true": True, "false": False}
_NUMBER = r"-?(?:0|[1-9]\d*)(\.\d+(?:e[+-]\d+)?)?"
_LINE = r"( *)(\w+):(?: +([^ #\"\[]+|\[[^#\"\[\]{}]*\]|\"[^\"\\]*\"))?(?: +#.*)? *"


def is_word(text: str) -> bool:
    """Whether YAML takes `text`, as it is, for that text."""
    return (
        re.fullmatch(WORD, text) is not None
        and text.lower() not in SPECIAL
        and not re.match(r"\.\d", text)
        and text.strip(".") != ""
    )


def plain_scalar(text: str) -> tuple[Any] | None:
    """(the value of a plain scalar,); None for anything else."""
    if text in _CONSTANTS:
        return (_CONSTANTS[text],)
    if number := re.fullmatch(_NUMBER, text):
        return (float(text) if number[1] else int(text),)
    return (text,) if is_word(text) else None


def plain_mapping(text: str, node: Callable[[Any, int, str | None], Any]) -> Any | None:
    """The tree of a text of plain lines, made by `node(value, line, text of a scalar)`; None where one of them is not plain."""
    if not text.replace("\n", "").isprintable():
        return None
    root: dict[str, Any] = {}
    open_sections: list[tuple[int, dict[str, Any]]] = [(0, root)]
    first, waiting = 0, None
    """waiting: (mapping, key, line, indent) of a key without a value, which the next line may make a section."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" ") or line.lstrip(" ").startswith("#"):
            continue
        if (parts := re.fullmatch(_LINE, line)) is None:
            return None
        indent, key, written = len(parts[1]), parts[2], parts[3]
        first = first or number
        if waiting is not None:
            mapping, name, its_line, its_indent = waiting
            if indent > its_indent:
                open_sections.append((indent, below := {}))
                mapping[name] = node(below, its_line, None)
            waiting = None
        while len(open_sections) > 1 and indent < open_sections[-1][0]:
            open_sections.pop()
        mapping = open_sections[-1][1]
        if indent != open_sections[-1][0] or key in mapping or not is_word(key):
            return None
        if written is None:
            mapping[key], waiting = node(None, number, ""), (mapping, key, number, indent)
        elif written == "{}":
            mapping[key] = node({}, number, None)
        elif written.startswith("["):
            items = [item.strip(" ") for item in written[1:-1].split(",")] if written != "[]" else []
            found = [(value, item) for item in items if (value := plain_scalar(item)) is not None]
            if len(found) < len(items):
                return None
            mapping[key] = node([node(value[0], number, item) for value, item in found], number, None)
        elif written.startswith('"'):
            mapping[key] = node(written[1:-1], number, written[1:-1])
        elif (found := plain_scalar(written)) is not None:
            mapping[key] = node(found[0], number, written)
        else:
            return None
    return node(root, first or 1, None)
