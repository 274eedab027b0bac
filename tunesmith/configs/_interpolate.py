"""`${a.b}` in a tree of nodes: the value of another option."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.configs._layers import UNRESOLVED, Node, Problem, find, to_node

_REFERENCE = r"(?<!\$)\$\{\s*([^{}]*?)\s*\}"


class Interpolation:
    """Replaces `${a.b}` by the value of that key, wherever it was written; `$${a}` stays as the text `${a}`.

    `default(keys)` gives the value of a key that no layer sets, or raises KeyError.
    """

    def __init__(self, tree: Node, default: Callable[[list[str]], Any], problems: list[Problem], strict: bool = True):
        self.root, self.default, self.problems, self.strict = tree, default, problems, strict
        self.open: list[str] = []
        self.circles: set[frozenset[str]] = set()

    def run(self) -> Node:
        return self.node(self.root)

    def node(self, node: Node) -> Node:
        if isinstance(node.value, dict):
            return Node({key: self.node(child) for key, child in node.value.items()}, node.place)
        if isinstance(node.value, list):
            return Node([self.node(child) for child in node.value], node.place, node.text)
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        if whole := re.fullmatch(_REFERENCE, node.value):
            found = self.reference(whole[1], node)
            return Node(found.value, node.place, found.text)
        missing = len(self.problems)
        text = re.sub(_REFERENCE, lambda match: self.inside(match, node), node.value)
        if len(self.problems) > missing:
            return Node(UNRESOLVED, node.place)
        return Node(text.replace("$${", "${") if self.strict else text, node.place, None)

    def inside(self, match: re.Match, node: Node) -> str:
        found = self.reference(match[1], node)
        if found.value is UNRESOLVED or found.value == match[0]:
            return match[0]
        if isinstance(found.value, (dict, list)):
            self.report(node, f"`{match[0]}` stands inside text but names a section or list")
            return match[0]
        return found.text if found.text is not None else str(found.value)

    def reference(self, dotted: str, node: Node) -> Node:
        """The node that `${dotted}` names."""
        if dotted in self.open:
            circle = self.open[self.open.index(dotted) :]
            if frozenset(circle) not in self.circles:
                self.circles.add(frozenset(circle))
                self.report(node, f"`${{{dotted}}}` goes round in a circle: {' → '.join([*circle, dotted])}")
            return Node(UNRESOLVED, node.place)
        target = find(self.root, dotted.split("."))
        if target is None:
            return self.default_of(dotted, node)
        self.open.append(dotted)
        try:
            return self.node(target)
        finally:
            self.open.pop()

    def default_of(self, dotted: str, node: Node) -> Node:
        try:
            return to_node(self.default(dotted.split(".")), node.place)
        except KeyError:
            if not self.strict:
                return Node(f"${{{dotted}}}", node.place)
            from tunesmith.configs._suggest import did_you_mean

            self.report(node, f"`${{{dotted}}}` names no option{did_you_mean(dotted, self.names())}")
            return Node(UNRESOLVED, node.place)

    def names(self) -> list[str]:
        """What could be named: everything that was written."""
        return [".".join(keys) for keys in _paths(self.root)]

    def report(self, node: Node, text: str) -> None:
        problem = Problem(node.place, text)
        if problem not in self.problems:
            self.problems.append(problem)


def _paths(node: Node) -> Iterator[tuple[str, ...]]:
    """The keys of every node below this one."""
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield (key,)
            yield from ((key, *rest) for rest in _paths(child))
