"""The command line `tune`: one short file per verb; nothing here imports torch before a recipe runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import argparse


def take_flags(words: list[str], *flags: str) -> tuple[set[str], list[str]]:
    """Those of `flags` that are among the words, and the other words in their order. argparse alone would take a tenth of a quick verb's time."""
    return {word for word in words if word in flags}, [word for word in words if word not in flags]


def parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The argument parser of a verb with many options, its help ending in examples."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """argparse whose mistakes are one sentence."""

        def error(self, message: str) -> NoReturn:
            print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
            raise SystemExit(2)

    return Parser(
        prog=f"tune {verb}",
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
