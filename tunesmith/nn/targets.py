"""Which layers a choice such as `weights.target_modules` means, by their names alone. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from tunesmith.errors import UserError


def choose_layers(names: Sequence[str], heads: Collection[str], target_modules: str | Iterable[str]) -> list[str]:
    """Those of `names`, all layers that can carry an adapter, that `target_modules` means, in the same order.

    "all-linear": all but `heads`, the output layers. A list: a layer whose full name, or the end of it after a dot, is in the list.
    Another string: a layer whose full name it matches as a regular expression (as PEFT does), or a single name.
    Raises UserError for a name that no layer has; it lists those there are.
    """
    if target_modules == "all-linear":
        return [name for name in names if name not in heads]
    if isinstance(target_modules, str):
        is_name = any(_ends_with(name, target_modules) for name in names)
        if not is_name:
            return _match_pattern(names, target_modules)
        target_modules = [target_modules]
    wanted = list(target_modules)
    for target in wanted:
        if not any(_ends_with(name, target) for name in names):
            raise UserError(_unknown_target(target, names))
    return [name for name in names if any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _match_pattern(names: Sequence[str], pattern: str) -> list[str]:
    try:
        matching = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"target_modules {pattern!r} is no regular expression: {error}") from None
    if not matching:
        raise UserError(_unknown_target(pattern, names))
    return matching


def _unknown_target(target: str, names: Sequence[str]) -> str:
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"target_modules names {target!r}, but no linear layer of this model is called that{hint}: there are {', '.join(leaves)}; or write all-linear"
