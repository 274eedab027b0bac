"""Turns a tree of nodes into the recipe's dataclass; every mistake is collected, with its place and the word that was meant."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

from tunesmith.configs import _layers as layers
from tunesmith.configs import _schema as schema
from tunesmith.configs._layers import NOWHERE, Node, Place, Problem
from tunesmith.configs._suggest import FOREIGN_NAMES, did_you_mean, options

FAILED: Any = object()
"""Stands for a value that could not be made; its reason is among the problems."""


class _Required:
    """Stands for a required value that is not given yet, in configs that are only shown or copied."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


def unfilled(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of what is still REQUIRED in a config that was loaded with `partial`."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is REQUIRED:
            found.append(prefix + field.name)
        elif dataclasses.is_dataclass(value):
            found += unfilled(value, f"{prefix}{field.name}.")
    return found


class Check:
    """One pass over a tree. `partial` fills missing required options with REQUIRED instead of reporting them."""

    def __init__(self, root: type, problems: list[Problem], *, partial: bool = False):
        self.root, self.problems, self.partial = root, problems, partial

    def run(self, tree: Node) -> Any:
        return self.section(self.root, tree, "", {})

    def report(self, place: Place, text: str) -> Any:
        self.problems.append(Problem(place, text))
        return FAILED

    # --- sections ---

    def section(self, cls: type, node: Node, path: str, chosen: dict[str, Any]) -> Any:
        """An instance of `cls`; `chosen` holds what the choice of the class already settled (its dotted `type`)."""
        if node.value is None:
            node = Node({}, node.place)
        if not isinstance(node.value, dict):
            return self.report(node.place, self._not_a_section(cls, node, path))
        entries, hints, found = _without_yielding(cls, node.value), schema.hints(cls), len(self.problems)
        for key in entries.keys() - hints.keys():
            self.unknown(cls, key, entries[key], path)
        values = dict(chosen)
        for field in dataclasses.fields(cls):
            below = f"{path}.{field.name}" if path else field.name
            if field.name in entries and self.left_open(field, hints[field.name], entries[field.name]):
                values[field.name] = self.missing(cls, field, below, path, entries[field.name])
            elif field.name in entries:
                values[field.name] = self.value(hints[field.name], entries[field.name], below, schema.default_of(field))
            elif field.name not in values and schema.default_of(field) is schema.MISSING:
                values[field.name] = (
                    self.open(hints[field.name], below) if self.partial else self.missing(cls, field, below, path, node)
                )
        if len(self.problems) > found or any(value is FAILED for value in values.values()):
            self.rules_of_the_rest(cls, values, entries, path)
            return FAILED
        return self.make(cls, values, entries, path)

    def left_open(self, field: dataclasses.Field, hint: Any, node: Node) -> bool:
        """Whether a required option was written without a value, as `tune cp` leaves it."""
        empty = (
            node.value is None and not schema.optional(hint) and not any(map(schema.is_section, schema.members(hint)))
        )
        return empty and schema.default_of(field) is schema.MISSING and not self.partial

    def open(self, hint: Any, path: str) -> Any:
        """What stands for a required option that is not given yet: a section shows its options."""
        section = next((member for member in schema.members(hint) if schema.is_section(member)), None)
        return self.section(section, Node({}, NOWHERE), path, {}) if section else REQUIRED

    def make(self, cls: type, values: dict[str, Any], entries: dict[str, Node], path: str) -> Any:
        try:
            return cls(**values)
        except ValueError as error:  # what __post_init__ finds: one line per mistake
            for line in str(error).split("\n"):
                self.broken_rule(line, entries, path)
            return FAILED

    def rules_of_the_rest(self, cls: Any, values: dict[str, Any], entries: dict[str, Node], path: str) -> None:
        """Report broken rules between the options that are right, although others of the section are not."""
        if not hasattr(cls, "problems"):
            return
        trial, unsure = object.__new__(cls), set()
        for field in dataclasses.fields(cls):
            value = values.get(field.name, FAILED)
            if value is FAILED and field.name in values:
                unsure.add(field.name)
            if value is FAILED:
                value = schema.default_of(field)
            setattr(trial, field.name, REQUIRED if value is schema.MISSING else value)
        for line in trial.problems():
            if not unsure.intersection(re.findall(r"`(\w+)", line)):
                self.broken_rule(line, entries, path)

    def broken_rule(self, line: str, entries: dict[str, Node], path: str) -> None:
        """Report what a rule of a section says, at the place of the options that it names in backticks."""
        places = {
            place
            for name in re.findall(r"`([\w.]+)", line)
            if (place := self._written(entries, name)) and not place.shipped
        }
        place = max(places, default=NOWHERE)
        where = f"in `{path}`, " if path else ""
        others = dict.fromkeys(str(other) for other in sorted(places) if str(other) != str(place))
        self.report(place, where + line + "".join(f" (also {other})" for other in others))

    def _written(self, entries: dict[str, Node], dotted: str) -> Place | None:
        """Where an option that a message names was written."""
        first, _, rest = dotted.partition(".")
        node = entries.get(first)
        if node is not None and rest and isinstance(node.value, dict):
            return self._written(node.value, rest)
        return node.place if node is not None else None

    def missing(self, cls: type, field: dataclasses.Field, dotted: str, path: str, node: Node) -> Any:
        place = node.place if (path or node.value is None) and not node.place.shipped else NOWHERE
        section = next(
            (member for member in schema.members(schema.hints(cls)[field.name]) if schema.is_section(member)), None
        )
        inner = (
            next((f for f in dataclasses.fields(section) if schema.default_of(f) is schema.MISSING), None)
            if section
            else None
        )
        if section is not None and inner is not None:
            cls, field, dotted = section, inner, f"{dotted}.{inner.name}"
        return self.report(
            place, f"`{dotted}` is required: {schema.sentences(cls).get(field.name, 'it has no default.')}"
        )

    def unknown(self, cls: type, key: str, node: Node, path: str) -> None:
        dotted = f"{path}.{key}" if path else key
        place = next((leaf.place for leaf in node.leaves() if not leaf.place.shipped), node.place)
        self.report(place, f"no option `{dotted}`{self.suggestion(cls, key, path)}")

    def suggestion(self, cls: type, key: str, path: str) -> str:
        """The nearest option of this section, or the same option in another one."""
        known = FOREIGN_NAMES.get(key, key)
        same = [dotted for dotted in options(self.root) if dotted == known or dotted.rpartition(".")[2] == known]
        if same:
            return f"; did you mean `{same[0]}`?"
        near = did_you_mean(key, schema.hints(cls), f"{path}." if path else "")
        return near or f"; see `tune ls` for the options of {cls.__name__.lower()}"

    def _not_a_section(self, cls: type, node: Node, path: str) -> str:
        keys = schema.hints(cls)
        example = next((name for name in ("source", "path", "lr", "enabled") if name in keys), next(iter(keys), "key"))
        return f"`{path}` is a section, not a single value ({show(node)}); write `{path}.{example}`"

    # --- values ---

    def value(self, hint: Any, node: Node, path: str, default: Any = schema.MISSING) -> Any:
        """`node` as the type `hint`, or FAILED."""
        if node.value is layers.UNRESOLVED:
            return FAILED
        if node.value is None and schema.optional(hint):
            return None
        if node.value is None and default is schema.MISSING and self.partial:
            return REQUIRED
        alternatives = schema.members(hint)
        if node.unread and any(_holds_others(member) for member in alternatives):
            return self.report(node.place, _unread(node, path, str in alternatives))
        if schema.is_choice(hint):
            return self.choice(hint, node, path, default)
        if len(alternatives) == 1:
            return self.single(alternatives[0], node, path, hint)
        fitting = [member for member in alternatives if _has_shape(member, node)]
        if len(fitting) == 1:
            return self.single(fitting[0], node, path, hint)
        for member in fitting:  # scalars: the first alternative that takes the value as it is
            trial = Check(self.root, [], partial=self.partial)
            made = trial.single(member, node, path, hint)
            if made is not FAILED:
                return made
        inside = next(
            (name for m in alternatives if schema.is_section(m) for name in schema.hints(m) if name == "source"), None
        )
        cure = f"; write `{path}.{inside}`" if inside and isinstance(node.value, str) else ""
        return self.report(node.place, f"`{path}` should be {schema.in_words(hint)}, got {show(node)}{cure}")

    def single(self, hint: Any, node: Node, path: str, said: Any) -> Any:
        """`node` as one type that is no union; `said` is the whole type, for the message."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return node.plain()
        if schema.is_section(hint):
            return self.section(hint, node, path, {})
        if origin in (list, tuple):
            return self.items(origin, args, node, path, said)
        if origin is dict or hint is dict:
            return self.mapping(args or (str, Any), node, path, said)
        made = scalar(hint, origin, args, node)
        if made is FAILED:
            near = did_you_mean(str(node.value), [str(a) for a in args]) if origin is typing.Literal else ""
            wanted = "a finite number" if hint is float and isinstance(node.value, float) else schema.in_words(said)
            quotes = (
                "; put text that reads like one in quotes"
                if hint is str and isinstance(node.value, dict | list)
                else ""
            )
            self.report(node.place, f"`{path}` should be {wanted}, got {show(node)}{near}{quotes}")
        return made

    def items(self, origin: Any, args: tuple, node: Node, path: str, said: Any) -> Any:
        if (
            isinstance(node.value, dict) and node.value and all(key.isdigit() for key in node.value)
        ):  # dataset.0.source=…
            indexed = sorted(node.value.items(), key=lambda entry: int(entry[0]))
            if [int(key) for key, _ in indexed] != list(range(len(indexed))):
                return self.report(node.place, f"the entries of `{path}` count from 0 without gaps")
            node = Node([child for _, child in indexed], node.place)
        if not isinstance(node.value, list):
            return self.report(node.place, f"`{path}` should be {schema.in_words(said)}, got {show(node)}")
        kinds = args if origin is tuple and Ellipsis not in args else (args[0],) * len(node.value)
        if len(kinds) != len(node.value):
            return self.report(node.place, f"`{path}` should be {schema.in_words(said)}, got {len(node.value)} of them")
        made = [
            self.value(kind, child, f"{path}.{i}")
            for i, (kind, child) in enumerate(zip(kinds, node.value, strict=True))
        ]
        return FAILED if any(item is FAILED for item in made) else origin(made)

    def mapping(self, args: tuple, node: Node, path: str, said: Any) -> Any:
        if node.value is None:
            return {}
        if not isinstance(node.value, dict):
            return self.report(node.place, f"`{path}` should be {schema.in_words(said)}, got {show(node)}")
        made = {key: self.value(args[1], child, f"{path}.{key}") for key, child in node.value.items()}
        return FAILED if any(item is FAILED for item in made.values()) else made

    # --- sections chosen by `type` ---

    def choice(self, hint: Any, node: Node, path: str, default: Any) -> Any:
        """The section that `type` names; what only the shipped layers wrote and this type has not is dropped."""
        classes, outside = schema.choices(hint), schema.third_party(hint)
        if isinstance(node.value, str) and (node.value in classes or outside and "." in node.value):
            node = Node({"type": node}, node.place)  # optimizer=sgd
        if node.value is None:
            node = Node({}, node.place)
        if not isinstance(node.value, dict):
            example = f"one of {', '.join(classes)}"
            return self.report(
                node.place, f"`{path}` should be {example}, or a section with a `type`, got {show(node)}"
            )
        kind = node.value.get("type")
        name = kind.value if kind is not None else getattr(default, "type", None)
        if isinstance(name, str) and name in classes:
            return self.chosen(classes[name], classes, node, path, {})
        if isinstance(name, str) and "." in name and outside:
            return self.chosen(outside, classes, self._pass_on(outside, node), path, {"type": name})
        dotted = ", or the dotted path of a class" if outside else ""
        if name is None:
            return self.report(node.place, f"`{path}.type` is required: one of {', '.join(classes)}{dotted}")
        place = kind.place if kind is not None else node.place
        near = did_you_mean(str(name), classes)
        return self.report(place, f"`{path}.type` should be one of {', '.join(classes)}{dotted}, got {name!r}{near}")

    def chosen(self, cls: type, classes: dict[str, type], node: Node, path: str, given: dict[str, Any]) -> Any:
        hints, kind = schema.hints(cls), node.value.get("type")
        name = given.get("type") or cls.type
        entries = {}
        for key, child in node.value.items():
            if key == "type":
                continue
            if key in hints:
                entries[key] = child
            elif not all(leaf.place.shipped for leaf in child.leaves()):
                self.not_of_type(cls, classes, name, kind, f"{path}.{key}", child)
        return self.section(cls, Node(entries, node.place), path, given)

    def not_of_type(self, cls: type, classes: dict, name: str, kind: Node | None, dotted: str, node: Node) -> None:
        key, section = dotted.rpartition(".")[2], dotted.rpartition(".")[0]
        owners = [other for other, its_class in classes.items() if key in schema.hints(its_class)]
        by = f" ({kind.place})" if kind is not None and not kind.place.shipped and kind.place != node.place else ""
        text = f"`{section}.type: {name}`{by} has no option `{key}`"
        if len(owners) == 1:
            text += f"; write `{section}.type={owners[0]}` too, or drop it with `~{dotted}`"
        elif owners:
            text += f"; {', '.join(owners)} have it: choose one, or drop it with `~{dotted}`"
        else:
            text += did_you_mean(key, schema.hints(cls), f"{section}.")
        self.report(node.place, text)

    def _pass_on(self, cls: type, node: Node) -> Node:
        """Keys that only the third-party class can know go to its `options`."""
        own, others = {}, {}
        for key, child in node.value.items():
            if key == "type" or key in schema.hints(cls):
                own[key] = child
            elif not all(leaf.place.shipped for leaf in child.leaves()):
                others[key] = child
        if others:
            written = own.get("options")
            written = written.value if written is not None and isinstance(written.value, dict) else {}
            own["options"] = Node({**written, **others}, node.place)
        own.pop("type", None)
        return Node(own, node.place)


def _without_yielding(cls: type, entries: dict[str, Node]) -> dict[str, Node]:
    """Without the shipped values that give way to what the user wrote instead (the class's `gives_way`)."""
    given = {key for key, node in entries.items() if node.value and not node.place.shipped}
    gives_way = getattr(cls, "gives_way", {})
    return {k: node for k, node in entries.items() if not (node.place.shipped and gives_way.get(k) in given)}


# --- scalars -------------------------------------------------------------------------------------


def scalar(hint: Any, origin: Any, args: tuple, node: Node) -> Any:
    """The scalar of `node` as the type `hint`, or FAILED."""
    value = node.value
    if origin is typing.Literal:
        exact = [arg for arg in args if arg == value and type(arg) is type(value)]
        return exact[0] if exact else next((arg for arg in args if arg == node.text), FAILED)
    if hint in (str, Path):
        if isinstance(value, (dict, list)):  # text on the command line that only looks like YAML, such as [95%:]
            return FAILED if node.text is None else hint(node.text)
        return FAILED if value is None else hint(value if isinstance(value, str) or node.text is None else node.text)
    if isinstance(value, bool) or hint is bool:
        return value if hint is bool and isinstance(value, bool) else FAILED
    if hint is float and isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else FAILED
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if hint is int and isinstance(value, int) else FAILED


def _holds_others(hint: Any) -> bool:
    """Whether a value of this type is written as a list or a section."""
    return schema.is_section(hint) or (typing.get_origin(hint) or hint) in (list, tuple, dict)


def _unread(node: Node, path: str, may_be_text: bool) -> str:
    """What to say of something in brackets that is no YAML."""
    kind, example = ("list", '["a: b", c]') if str(node.value).startswith("[") else ("section", '{a: "b: c"}')
    whole = ", or the whole of it if it is one text" if may_be_text else ""
    return f"`{path}` looks like a {kind} but can't be read as one ({node.unread}): put text that holds `:`, `#` or brackets in quotes, as in {example}{whole}"


def _has_shape(hint: Any, node: Node) -> bool:
    """Whether a node of this shape could be a `hint` at all."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if isinstance(node.value, dict):
        indexed = bool(node.value) and all(key.isdigit() for key in node.value)
        return origin is list if indexed else schema.is_section(hint) or origin is dict
    if isinstance(node.value, list):
        return origin in (list, tuple)
    return not schema.is_section(hint) and origin not in (list, tuple, dict)


def show(node: Node) -> str:
    """What was written, short enough for a message."""
    if isinstance(node.value, dict):
        return "a section"
    if isinstance(node.value, list):
        return "a list"
    text = (
        "null"
        if node.value is None
        else repr(node.value)
        if isinstance(node.value, str)
        else str(node.text or node.value)
    )
    return text if len(text) <= 60 else text[:57] + "..."
