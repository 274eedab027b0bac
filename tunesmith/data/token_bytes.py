"""The bytes that each token stands for in a text, read off the tokenizer's decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.tokenizer_files import byte_letters
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """A text is its tokens' bytes one after the other."""

    of: tuple[bytes, ...]
    """By id; empty for special tokens and for ids without a token."""
    drops_first_space: bool
    """Whether a space that begins a text is left out, as SentencePiece puts one there."""

    def begins_text(self, before: Sequence[int]) -> bool:
        """Whether what follows the ids `before` is the beginning of the text, since none of them is text."""
        return not any(self.of[number] for number in before if number < len(self.of))


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """What tokenizer.decode() makes of each token. Raises UserError for a decoder that does more than join bytes (WordPiece)."""
    decoder = json.loads(tokenizer.backend.to_str())["decoder"]
    convert, drops = _reader(decoder, tokenizer)
    found = [b""] * tokenizer.vocab_size
    for text, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if number not in tokenizer.special_ids:
            found[number] = convert(text)
    return TokenBytes(tuple(found), drops)


def _reader(decoder: dict[str, Any] | None, tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """(text of a token in the vocabulary → its bytes, whether a space that begins a text is dropped)."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _of_letters, False
    spaces = [_space(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    known = not set(kinds) - {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if not known or len(spaces) != 1 or spaces[0] is None or not all(map(_is_known_strip, steps)):
        raise UserError(
            f"the tokenizer of {tokenizer.source} does not say which bytes its tokens stand for (its decoder is "
            f"{' + '.join(kinds) or 'missing'}): use a model with a byte-level or SentencePiece tokenizer"
        )
    mark, has_bytes = spaces[0], "ByteFallback" in kinds
    drops = any(step["type"] == "Strip" or step.get("prepend_scheme") in ("always", "first") for step in steps)

    def convert(text: str) -> bytes:
        one = _BYTE.fullmatch(text) if has_bytes else None
        return bytes([int(one[1], 16)]) if one else text.replace(mark, " ").encode()

    return convert, drops


_LETTERS = {letter: byte for byte, letter in enumerate(byte_letters())}


def _of_letters(text: str) -> bytes:
    """Each letter is a byte; a token with another character in it (an added one) is written as it is."""
    try:
        return bytes([_LETTERS[letter] for letter in text])
    except KeyError:
        return text.encode()


def _space(step: dict[str, Any]) -> str | None:
    """The character that stands for a space, if that is all that the step replaces."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    return step["pattern"].get("String") if step["content"] == " " else None


def _is_known_strip(step: dict[str, Any]) -> bool:
    return step["type"] != "Strip" or (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
