"""What a run says while it runs: one live line in a terminal, plain lines in a pipe or under CI."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 10.0
_LINE_SHARE = 0.05


class Progress:
    """Shows step, loss, tokens per second, TFLOP/s of a device, their share of its peak, peak memory and the time left.

    In a terminal one line is redrawn in place; in a pipe, in a dumb terminal or under CI (variable CI) a plain line is written for the first and the last step,
    and between them after every 5 % of the steps or 10 seconds (a minute in runs of more than ten), without control characters.
    `enabled` false (every rank but the main one) shows nothing. `done` steps were made before, by the run that is resumed.
    """

    def __init__(self, total_steps: int | None, enabled: bool = True, stream: TextIO | None = None, done: int = 0):
        self.total_steps, self.enabled, self.step = total_steps, enabled, done
        self._stream = stream or sys.stdout
        self._is_live = enabled and is_live(self._stream)
        self._has_color = self._is_live and not os.environ.get("NO_COLOR")
        self._stats: dict[str, Any] = {}
        self._times: deque[tuple[int, float]] = deque([(done, time.monotonic())], maxlen=64)
        self._started = time.monotonic()
        self._shown_at, self._shown_step, self._line_is_open = -float("inf"), None, False

    def update(self, step: int, stats: Mapping[str, Any] = {}) -> None:
        """Show that `step` is done; `stats` may hold loss, tokens_per_second, tflops_per_device, mfu and peak_memory_gib, what is missing keeps its last value."""
        if not self.enabled:
            return
        self.step = step
        self._stats |= stats
        self._times.append((step, time.monotonic()))
        if self._is_due():
            self._show()

    def note(self, text: str) -> None:
        """Print `text` on a line of its own; the live line moves below it."""
        if not self.enabled:
            return
        self._erase()
        self._write(text + "\n")
        if self._is_live and self._shown_step is not None:
            self._show()

    def close(self) -> None:
        """Show the last step, if it was not, and leave the line; safe to call twice."""
        if not self.enabled:
            return
        if self._shown_step is not None and self._shown_step != self.step:
            self._show()
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False
        self.enabled = False

    def _is_due(self) -> bool:
        now = time.monotonic()
        if self._shown_step is None or self.step == self.total_steps:
            return True
        if self._is_live:
            return now - self._shown_at >= _REDRAW_SECONDS
        interval = _LINE_SECONDS if now - self._started < 600 else 6 * _LINE_SECONDS
        return now - self._shown_at >= interval or (
            self.total_steps is not None and self.step - self._shown_step >= _LINE_SHARE * self.total_steps
        )

    def _show(self) -> None:
        self._shown_at, self._shown_step = time.monotonic(), self.step
        if not self._is_live:
            self._write("  ".join(self._pieces()) + "\n")
            return
        self._write("\r" + self._live_line(shutil.get_terminal_size().columns - 1) + "\x1b[K")
        self._line_is_open = True

    def _erase(self) -> None:
        if self._line_is_open:
            self._write("\r\x1b[K")
            self._line_is_open = False

    def _live_line(self, width: int) -> str:
        """The bar and as many pieces as `width` columns hold; the first ones matter most."""
        pieces = self._pieces()
        while len(pieces) > 1 and len("  ".join(pieces)) > width:
            del pieces[-2 if len(pieces) > 2 else -1]  # the time left goes last
        line = "  ".join(pieces)
        room = min(width - len(line) - 2, 30)
        if self.total_steps and room >= 8:
            return "  ".join([pieces[0], self._bar(room), *pieces[1:]])
        return line[:width]

    def _bar(self, width: int) -> str:
        assert self.total_steps
        full, empty = ("━", "─") if _can_write(self._stream, "━─") else ("#", "-")
        filled = min(width, width * self.step // self.total_steps)
        done, rest = full * filled, empty * (width - filled)
        return f"\x1b[36m{done}\x1b[90m{rest}\x1b[0m" if self._has_color else done + rest

    def _pieces(self) -> list[str]:
        stats = self._stats
        pieces = [f"step {self.step}/{self.total_steps}" if self.total_steps else f"step {self.step}"]
        if stats.get("loss") is not None:
            pieces.append(f"loss {float(stats['loss']):.4f}")
        if stats.get("tokens_per_second"):
            pieces.append(f"{float(stats['tokens_per_second']):,.0f} tokens/s")
        if (stats.get("tflops_per_device") or 0) >= 0.1:  # less is a tiny model's, where it says nothing
            pieces.append(f"{float(stats['tflops_per_device']):,.3g} TFLOP/s")
        if stats.get("mfu"):
            pieces.append(f"MFU {float(stats['mfu']):.1%}")
        if stats.get("peak_memory_gib"):
            pieces.append(f"{float(stats['peak_memory_gib']):.2f} GiB")
        pieces.append(self._time_left())
        return [piece for piece in pieces if piece]

    def _time_left(self) -> str:
        """From the last steps; the first one, which may compile and warm up, counts only while it is alone."""
        if self.total_steps and self.step >= self.total_steps:
            return f"took {format_seconds(time.monotonic() - self._started)}"
        times = list(self._times)[1:] if len(self._times) > 2 else list(self._times)
        steps, seconds = times[-1][0] - times[0][0], times[-1][1] - times[0][1]
        if not self.total_steps or steps <= 0:
            return ""
        return f"{format_seconds(seconds / steps * (self.total_steps - self.step))} left"

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Whoever read this is gone (`| head`, a closed terminal): no reason to lose a run, which goes on in silence.
            self.enabled = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def is_live(stream: TextIO) -> bool:
    """Whether lines on `stream` can be redrawn: a terminal that understands it, and no CI."""
    is_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return stream.isatty() and not is_ci and os.environ.get("TERM") != "dumb"


def format_bytes(count: int) -> str:
    """1.2 GB, 345 MB or 0.98 MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def format_seconds(seconds: float) -> str:
    """1.2 s, 59 s, 3:07, 1:02:03 or 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
