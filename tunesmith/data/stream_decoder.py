"""Ids decoded one by one, for text that is shown while it is generated."""

from __future__ import annotations

from collections.abc import Callable


class StreamDecoder:
    """Decodes ids one by one. The pieces joined are what decode() gives for all of them, unless bytes are no UTF-8:
    vocabularies with byte fallback then lose the whole run of bytes, of which a part may have been given out."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.window: list[int] = []
        """The ids that gave the last text, which decide on spaces and join bytes, and the ids after them."""
        self.context = 0
        """How many ids of the window have been decoded and given out."""
        self.said = ""
        """The text of those."""

    def add(self, number: int) -> str:
        """The text that became certain with this id; "" inside of a character or for a special token."""
        self.window.append(int(number))
        text = self.decode(self.window)
        if text.endswith("\ufffd") or len(text) <= len(self.said):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """What is left at the end: an incomplete character, as U+FFFD."""
        return self._give(self.decode(self.window))

    def _give(self, text: str) -> str:
        new = text[len(self.said) :]
        self.window = self.window[self.context :]
        self.context = len(self.window)
        self.said = self.decode(self.window)
        return new
