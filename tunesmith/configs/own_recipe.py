"""A recipe file of the user's own: its module, and the class of its options."""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError


def own_module_name(path: Path) -> str:
    return f"tunesmith_own_{path.stem}"


def own_module(path: Path) -> Any:
    """The user's recipe file as a module; its folder can be imported from."""
    import importlib.util

    name = own_module_name(path)
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path.resolve()):
        return sys.modules[name]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `tune cp sft {path}` writes a recipe to start from")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def own_config_class(path: Path) -> type:
    """The config class of a user's recipe file: what its main(config: …) is annotated with."""
    module = own_module(path)
    main = getattr(module, "main", None)
    if not callable(main):
        raise UserError(f"{path}: a recipe file needs a function main(config)")
    hints = [hint for name, hint in typing.get_type_hints(main).items() if name != "return"]
    if len(hints) != 1 or not dataclasses.is_dataclass(hints[0]):
        raise UserError(f"{path}: say which config main takes, such as `def main(config: SFT)`, with a dataclass")
    return typing.cast(type, hints[0])
