"""The decorator of every section of a config."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform


@dataclass_transform(field_specifiers=(dataclasses.field,))
def section(cls: Any = None, /, *, kw_only: bool = False) -> Any:
    """`dataclasses.dataclass`, but all sections share one way to be compared and shown: to write one for each takes as long as to import PyYAML."""

    def make(cls: type) -> type:
        made = dataclasses.dataclass(cls, eq=False, repr=False, kw_only=kw_only)
        made.__eq__, made.__repr__, made.__hash__ = _equal, _shown, None  # type: ignore[method-assign]
        return made

    return make if cls is None else make(cls)


def _values(of: Any) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}


def _equal(self: Any, other: Any) -> bool:
    return _values(self) == _values(other) if type(self) is type(other) else NotImplemented


def _shown(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in _values(self).items())})"
