"""Standard error without the progress bars of other libraries, for files and pipes."""

from __future__ import annotations

import io
from typing import TextIO


class WithoutBars(io.TextIOBase):
    """Passes on what is written, but for bars, which begin by going back to the start of the line (tqdm offers no switch that works
    once it is imported)."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream, self._follows_bar = stream, False

    def write(self, text: str) -> int:
        is_bar = text.startswith("\r")
        if text and not is_bar and not (self._follows_bar and text == "\n"):
            self._stream.write(text)
        self._follows_bar = is_bar or self._follows_bar and not text
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
