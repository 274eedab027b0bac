"""The command line `tune`: one short file per verb; nothing here imports torch before a recipe runs."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def parser(verb: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The argument parser of a verb, its help ending in examples."""
    return _Parser(
        prog=f"tune {verb}",
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
