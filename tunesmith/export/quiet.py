"""Silence for libraries that talk to their developers while a program is made."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

STANDARD_ERROR = 2


@contextmanager
def quietly() -> Iterator[None]:
    """Hold back warnings, log lines, and what compiled code writes to standard error; after an exception, print the latter after all."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _held_back():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _held_back() -> Iterator[None]:
    terminal = os.dup(STANDARD_ERROR)
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), STANDARD_ERROR)
            try:
                yield
            except BaseException:
                held.seek(0)
                os.write(terminal, held.read())
                raise
            finally:
                os.dup2(terminal, STANDARD_ERROR)
    finally:
        os.close(terminal)
