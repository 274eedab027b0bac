"""SIGINT, SIGTERM and SIGHUP during a run: before the loop they end it, in the loop they ask it to stop after the step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Before the loop takes over, SIGTERM ends the process as Ctrl-C does: what was begun is taken back, exit code 143."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if not _may_have_handlers():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def ignore_sigterm() -> None:
    """Until `end_on_sigterm` ends. For a run that failed: torchrun sends SIGTERM to the ranks that are left, and cleaning up must not pass for a wish to end."""
    if _may_have_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def stop_on_signal(ask: Callable[[int], None]) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP (a closed terminal) calls `ask` with its number; a second one of the same kind does what it did before."""
    if not _may_have_handlers():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, before[number] or signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # the signal came while a line was written: no other can be then
            ask(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {int(number): signal.getsignal(number) for number in numbers}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # under nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _may_have_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()
