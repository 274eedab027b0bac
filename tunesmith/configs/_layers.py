"""Layers of a config before they are checked: trees of nodes that remember where each value was written."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import yaml  # imported where it is needed: it takes as long as all other modules together


class Place(NamedTuple):
    """Where something was written; places sort in the order in which their sources were given."""

    order: int
    name: str
    line: int = 0
    shipped: bool = False
    """Whether tunesmith itself wrote it (a recipe's defaults, an overlay) rather than the user."""

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


NOWHERE = Place(1 << 30, "")


UNRESOLVED: Any = object()
"""The value of a node that can't be known, as the reason is among the problems already."""


class Problem(NamedTuple):
    """One mistake and its place."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.place.name else self.text


class Node:
    """A value as written: a dict of nodes, a list of nodes, or a scalar with its raw text."""

    __slots__ = ("place", "text", "unread", "value")

    def __init__(self, value: Any, place: Place, text: str | None = None, unread: str | None = None):
        """unread: why text of the command line that stands in brackets is no list or section."""
        self.value, self.place, self.text, self.unread = value, place, text, unread

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self) -> Iterator[Node]:
        """Every node below this one (or this one itself) that holds no others."""
        children = self.value.values() if isinstance(self.value, dict) else self.value
        if not isinstance(self.value, (dict, list)) or not self.value:
            yield self
        else:
            for child in children:
                yield from child.leaves()


# --- reading YAML --------------------------------------------------------------------------------


@functools.cache
def _loader() -> Any:
    """YAML as people mean it: 3e-4 is a number, 2024-01-01 is text. Through libyaml, where PyYAML was built with it."""
    import re

    import yaml

    fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(fastest):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def read_file(path: Path, order: int, problems: list[Problem], *, shipped: bool = False) -> Node | None:
    """The tree of a YAML file, or None when it can't be read (the reasons are added to `problems`)."""
    name = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(Problem(Place(order, name), "there is no such file"))
        return None
    except IsADirectoryError:
        problems.append(Problem(Place(order, name), "this is a folder, not a config file"))
        return None
    except OSError as error:
        problems.append(Problem(Place(order, name), f"can't be read ({error.strerror})"))
        return None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.append(Problem(Place(order, name, line), "not UTF-8 text; save the file as UTF-8"))
        return None
    return parse_text(text, name, order, problems, shipped=shipped)


def parse_text(text: str, name: str, order: int, problems: list[Problem], *, shipped: bool = False) -> Node | None:
    """The tree of YAML `text`; `name` stands for the file in messages."""
    import yaml

    try:
        loader = _loader()(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, text, name, order))
        return None
    if root is None:
        return Node({}, Place(order, name, 1, shipped))
    found = len(problems)
    node = _Reader(loader, name, order, shipped, problems).node(root)
    if not isinstance(node.value, dict):
        problems.append(Problem(node.place, "a config file is a mapping of `key: value` lines"))
    return node if len(problems) == found else None


def _syntax_problem(error: yaml.YAMLError, text: str, name: str, order: int) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 0
    lines = text.split("\n")
    if line and line <= len(lines) and "\t" in lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]:
        return Problem(Place(order, name, line), "a tab indents this line; YAML wants spaces")
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return Problem(Place(order, name, line), f"not valid YAML ({reason})")


class _Reader:
    """Turns PyYAML's nodes into ours; finds duplicate keys and endless aliases."""

    def __init__(self, loader: Any, name: str, order: int, shipped: bool, problems: list[Problem]):
        self.loader, self.name, self.order, self.shipped, self.problems = loader, name, order, shipped, problems
        self.open: set[int] = set()

    def node(self, node: Any) -> Node:
        import yaml

        place = Place(self.order, self.name, node.start_mark.line + 1, self.shipped)
        if id(node) in self.open:
            self.problems.append(Problem(place, "an alias that contains itself"))
            return Node(None, place)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return Node(self.mapping(node), place)
            if isinstance(node, yaml.SequenceNode):
                return Node([self.node(child) for child in node.value], place)
            return Node(self.loader.construct_object(node), place, node.value)
        except yaml.YAMLError as error:
            self.problems.append(Problem(place, f"not a value for a config ({getattr(error, 'problem', error)})"))
            return Node(None, place)
        except ValueError as error:  # a number that YAML's rules let through and Python's do not
            self.problems.append(Problem(place, f"not a value for a config ({error})"))
            return Node(None, place)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: Any) -> dict[str, Node]:
        import yaml

        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value != "<<" and str(key.value) in lines:
                first = lines[str(key.value)]
                text = f"`{key.value}` is written twice, first on line {first}; delete one of the two"
                self.problems.append(Problem(Place(self.order, self.name, line), text))
            lines.setdefault(str(key.value), line)
        self.loader.flatten_mapping(node)  # `<<: *anchor`
        entries = {}
        for key, value in node.value:
            entry = self.node(value)
            place = Place(self.order, self.name, key.start_mark.line + 1, self.shipped)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(place, "a key must be a single word"))
                continue
            entry.place = place  # the line of the key, also where the value starts below it
            entries[key.value] = entry
        return entries


# --- reading words of the command line -----------------------------------------------------------


def parse_value(text: str, place: Place) -> Node:
    """The node of the text behind `key=`: lists and dicts in YAML syntax, otherwise one scalar, whatever it contains."""
    import yaml

    loader = _loader()("")
    if text == "None":  # torchtune's and Python's word for null
        return Node(None, place, text)
    if text[:1] in tuple("[{\"'"):
        try:
            loader = _loader()(text)
            reader = _Reader(loader, "", place.order, False, [])
            node = reader.node(loader.get_single_node())
            if not reader.problems:
                _move(node, place)
                node.text = text if isinstance(node.value, (dict, list)) else str(node.value)
                return node
            reason = reader.problems[0].text
        except yaml.YAMLError as error:  # text that only looks like YAML, such as a prompt that begins with [INST]
            reason = str(getattr(error, "problem", None) or error)
        return Node(text, place, text, reason if _is_bracketed(text) else None)
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return Node(loader.construct_object(yaml.ScalarNode(tag, text)), place, text)
    except (yaml.YAMLError, ValueError):
        return Node(text, place, text)


def _is_bracketed(text: str) -> bool:
    """Whether the bracket that `text` begins with is closed by its last letter, and not before."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _move(node: Node, place: Place) -> None:
    node.place = place
    children = node.value.values() if isinstance(node.value, dict) else node.value
    if isinstance(node.value, (dict, list)):
        for child in children:
            _move(child, place)


def to_node(value: Any, place: Place) -> Node:
    """A plain value as a tree, all of it written at `place`."""
    if isinstance(value, dict):
        return Node({str(key): to_node(child, place) for key, child in value.items()}, place)
    if isinstance(value, (list, tuple)):
        return Node([to_node(child, place) for child in value], place)
    return Node(value, place, None if value is None else str(value))


def nest(keys: list[str], node: Node) -> Node:
    """{a: {b: node}} for the keys [a, b]."""
    for key in reversed(keys):
        node = Node({key: node}, node.place)
    return node


# --- merging -------------------------------------------------------------------------------------


def merge(base: Node, new: Node, problems: list[Problem], path: str = "") -> Node:
    """`new` laid over `base`: sections merge key by key, everything else is replaced."""
    if isinstance(base.value, list) and _is_indexed(new):
        return _merge_items(base, new, problems, path)
    if not isinstance(base.value, dict) or not isinstance(new.value, dict):
        return new
    if _is_indexed(new) != _is_indexed(base):
        return new if _is_indexed(new) and all(leaf.place.shipped for leaf in base.leaves()) else _mixed(base, new)
    merged = dict(base.value)
    for key, node in new.value.items():
        below = f"{path}.{key}" if path else key
        merged[key] = merge(merged[key], node, problems, below) if key in merged else node
    return Node(merged, new.place)


def _is_indexed(node: Node) -> bool:
    return isinstance(node.value, dict) and bool(node.value) and all(key.isdigit() for key in node.value)


def _mixed(base: Node, new: Node) -> Node:
    return Node({**base.value, **new.value}, new.place)


def _merge_items(base: Node, new: Node, problems: list[Problem], path: str) -> Node:
    items = list(base.value)
    for key, node in sorted(new.value.items(), key=lambda entry: int(entry[0])):
        index = int(key)
        if index < len(items):
            items[index] = merge(items[index], node, problems, f"{path}.{key}")
        elif index == len(items):
            items.append(node)
        else:
            count = "1 entry" if len(items) == 1 else f"{len(items)} entries"
            problems.append(Problem(node.place, f"`{path}` has {count}; `{path}.{index}` would leave a gap"))
    return Node(items, new.place)


def find(tree: Node, keys: list[str]) -> Node | None:
    """The node under the dotted keys, or None."""
    for key in keys:
        if isinstance(tree.value, dict) and key in tree.value:
            tree = tree.value[key]
        elif isinstance(tree.value, list) and key.isdigit() and int(key) < len(tree.value):
            tree = tree.value[int(key)]
        else:
            return None
    return tree


def delete(tree: Node, keys: list[str]) -> Node:
    """The tree without the node under the dotted keys."""
    if find(tree, keys) is None:
        return tree
    first, *rest = keys
    if isinstance(tree.value, list):
        items = list(tree.value)
        items[int(first) : int(first) + 1] = [delete(items[int(first)], rest)] if rest else []
        return Node(items, tree.place)
    entries = {key: node for key, node in tree.value.items() if key != first or rest}
    if rest:
        entries[first] = delete(entries[first], rest)
    return Node(entries, tree.place)
