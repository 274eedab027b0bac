"""Text from tokens as they come: pieces for a stream, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.tokenizer import Tokenizer

CONTEXT = 8
"""Tokens of the prompt that are decoded along: whether a word's first token brings a space depends on what stands before it."""


class TextStream:
    """The text of one continuation. Characters that lack bytes, and ends that may become a stop string, are held back until they are certain."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.text = ""
        """All of it so far, cut before the stop string."""
        self.is_stopped = False
        """Whether a stop string came."""
        self._stop, self._given = tuple(stop), 0
        self._decoder = tokenizer.stream_decoder()
        for number in prompt[-CONTEXT:]:
            self._decoder.add(number)

    def add(self, number: int) -> str:
        """Take one token; return the text that is certain now and was not given out before."""
        self._take(self._decoder.add(number))
        return self._give(self._certain())

    def finish(self) -> str:
        """No more tokens come: return what was held back."""
        if not self.is_stopped:
            self._take(self._decoder.finish())
        return self._give(len(self.text))

    def _take(self, piece: str) -> None:
        start = max(0, len(self.text) - max(map(len, self._stop), default=0) + 1)
        self.text += piece
        places = [place for place in (self.text.find(stop, start) for stop in self._stop) if place >= 0]
        if places:
            self.text, self.is_stopped = self.text[: min(places)], True

    def _certain(self) -> int:
        """How many characters can't belong to a stop string that is still coming."""
        if self.is_stopped:
            return len(self.text)
        held = (size for stop in self._stop for size in range(1, len(stop)) if self.text.endswith(stop[:size]))
        return len(self.text) - max(held, default=0)

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece


def continuation_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after `prompt`, decoded at once; the same as a TextStream gives piece by piece."""
    context = list(prompt[-CONTEXT:])
    before, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)
