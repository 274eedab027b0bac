"""Rules that an option must keep, each broken one told in one sentence."""

import re
from collections.abc import Iterator
from typing import Any


class Checked:
    """A section with rules of its own: `problems` yields one sentence per broken rule, the options named in backticks."""

    def problems(self) -> Iterator[str]:
        yield from ()

    def __post_init__(self):
        if found := list(self.problems()):
            raise ValueError("\n".join(found))


def below(least: float, section: Any, *names: str) -> Iterator[str]:
    """One sentence for each of the options `names` that is set and smaller than `least`."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            yield f"`{name}` must be at least {least:g}, got {value}"


def no_size(section: Any, name: str) -> Iterator[str]:
    """One sentence where the option `name` is set and is no size of files."""
    value = getattr(section, name)
    if value is not None and not re.fullmatch(r"(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]?i?B", value, re.IGNORECASE):
        yield f"`{name}` must be a size such as 500MB or 5GB, got {value!r}"


def outside(least: float, most: float, section: Any, *names: str) -> Iterator[str]:
    """One sentence for each of the options `names` that is set and not between `least` and `most`."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not least <= value <= most:
            yield f"`{name}` must be between {least:g} and {most:g}, got {value}"
