"""Output of a given form: what may come next under a JSON schema, a regular expression or a grammar, by `llguidance`.

V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.token_bytes import token_bytes
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError, require
from tunesmith.generation.text import CONTEXT

_WHITESPACE = r"[ ]?|\n[ \t]{0,40}"
"""Between the parts of JSON: a space, or a new line with its indentation. Without a limit a weak model may write spaces for ever."""
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """The form that a text must have. Made by json_schema(), regex() or grammar()."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool | str) -> Constraint:
        """JSON that a schema (an object, or its JSON text) allows; its "x-guidance" may hold options of llguidance."""
        if not isinstance(schema, str):
            return cls("json_schema", json.dumps(schema))
        try:
            return cls("json_schema", json.dumps(json.loads(schema)))
        except ValueError as error:
            raise UserError(f"the JSON schema is no JSON ({error}): correct it") from error

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches as a whole (Rust's syntax: no look-around, no references back)."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """Text of a context-free grammar, in Lark's syntax with the rule `start`, or llama.cpp's GBNF with `root`."""
        return cls("grammar", text)

    def check(self) -> None:
        """Raise UserError where it can't be used; needs no model."""
        is_wrong, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(self._grammar())
        if is_wrong:
            raise UserError(f"{self._name()} can't be used: {_reason(messages[0])}")

    def compile(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]) -> Compiled:
        """For a model with `vocab_size` logits whose text ends with any of `stop_ids`. The first of a tokenizer takes a second.

        Raises UserError like check(), and for a tokenizer whose tokens do not say which bytes they stand for.
        """
        words = _words(tokenizer, vocab_size, frozenset(stop_ids))
        after_text = self._matcher(words)
        return Compiled(words, after_text, self._matcher(words, " ") if words.bytes.drops_first_space else after_text)

    def _matcher(self, words: _Words, before: str = "") -> Matcher:
        self.check()
        limits = _llguidance().LLParserLimits(verbose_errors=False)
        matcher = _llguidance().LLMatcher(words.of_llguidance, self._grammar(before), limits=limits)
        if matcher.is_error():
            raise UserError(f"{self._name()} can't be used: {_reason(matcher.get_error())}")
        return Matcher(matcher, words, self._name())

    def _grammar(self, before: str = "") -> str:
        """As llguidance reads it, after the literal text `before`."""
        # Without no_forcing it would allow only the tokens that its own tokenizer makes of a text that must come.
        outer = '%llguidance {"no_forcing": true}\nstart: ' + f"{json.dumps(before)} @inner"
        return json.dumps({"grammars": [{"lark_grammar": outer}, {"name": "inner", **self._inner()}]})

    def _inner(self) -> dict[str, Any]:
        if self.kind == "json_schema":
            schema = json.loads(self.text)
            if isinstance(schema, dict):
                schema.setdefault("x-guidance", {"whitespace_pattern": _WHITESPACE})
            return {"json_schema": schema}
        if self.kind == "regex":
            return {"lark_grammar": f"start: /{_llguidance().regex_to_lark(self.text, '')}/"}
        try:
            return {
                "lark_grammar": _llguidance().grammar_from("gbnf" if _GBNF.search(self.text) else "lark", self.text)
            }
        except ValueError as error:
            raise UserError(f"{self._name()} can't be used: {error}") from error

    def _name(self) -> str:
        return {"json_schema": "the JSON schema", "regex": f"the regex {self.text}", "grammar": "the grammar"}[
            self.kind
        ]


@dataclass(frozen=True)
class Compiled:
    """A constraint over the tokens of one vocabulary."""

    words: _Words
    after_text: Matcher
    """Where the output begins behind other text."""
    opening: Matcher
    """Where the text begins: the same, unless the tokenizer's decoder drops a space there, which then comes first."""

    def start(self, prompt: Sequence[int]) -> Matcher:
        """For one sequence after the ids of its prompt."""
        opens_text = self.words.bytes.begins_text(prompt[-CONTEXT:])
        return (self.opening if opens_text else self.after_text).copy()


class Matcher:
    """How far one sequence has come in its form."""

    def __init__(self, matcher: Any, words: _Words, name: str):
        self._matcher, self._words, self._name = matcher, words, name
        self._ended = False
        self._allowed: Tensor | None = None

    def copy(self) -> Matcher:
        """Another one that goes on from here."""
        other = Matcher(self._matcher.deep_copy(), self._words, self._name)
        other._ended, other._allowed = self._ended, self._allowed
        return other

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; stop tokens exactly where the text may end. Not to be changed.

        Raises UserError where llguidance finds the form too costly, or where the vocabulary has no token that may come.
        """
        if self._allowed is None:
            self._allowed = self._words.mask(self._matcher.compute_bitmask())
            if self._matcher.is_error():
                raise UserError(f"{self._name} can't be kept: {_what_failed(self._matcher.get_error())}")
        return self._allowed

    def accept(self, token: int) -> None:
        """Go on by one of the allowed tokens; ValueError for another."""
        if not self.allowed()[token]:
            raise ValueError(f"token {token} can't come next under {self._name}")
        if token in self._words.stop_ids:
            self._ended = True
        else:
            self._matcher.consume_token(token)
            self._allowed = None

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but a stop token can follow."""
        return self._ended or self._matcher.is_stopped() or not self._words.has_text(self.allowed())


class _Words:
    """A vocabulary as llguidance needs it: the tokens' bytes, and one token more, in place V, for the end of the text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]):
        self.vocab_size, self.stop_ids = vocab_size, stop_ids
        self.stops = torch.tensor(sorted(number for number in stop_ids if number < vocab_size), dtype=torch.long)
        self.bytes = token_bytes(tokenizer)
        tokens = [*self.bytes.of[:vocab_size], *[b""] * (vocab_size - len(self.bytes.of))]
        special = [number for number in tokenizer.special_ids - stop_ids if number < vocab_size]
        for number in special:  # a grammar may name them
            tokens[number] = (tokenizer.id_to_token(number) or "").encode()
        for number in self.stops.tolist():
            tokens[number] = b""
        self.of_llguidance = _llguidance().LLTokenizer(_llguidance().TokenizerWrapper(_Source(tokens, special)))

    def mask(self, bits: bytes) -> Tensor:
        """(V,) bool from one bit a token, the last of which says whether the text may end."""
        flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.vocab_size + 1, bitorder="little")
        allowed = torch.from_numpy(flags.view(bool))
        allowed[self.stops] = allowed[-1].clone()
        return allowed[:-1]

    def has_text(self, allowed: Tensor) -> bool:
        """Whether any but stop tokens are among the `allowed` (V,)."""
        return bool(allowed.sum() > allowed[self.stops].sum())


class _Source:
    """What llguidance reads a vocabulary from; the last token is the end of the text."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]):
        self.tokens, self.eos_token_id = [*tokens, b"<end>"], len(tokens)
        self.special_token_ids = [*special, len(tokens)]

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text, which llguidance wants where it forces tokens."""
        return []


def _words(tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> _Words:
    key = ("words of llguidance", vocab_size, stop_ids)
    if key not in tokenizer.derived:
        tokenizer.derived[key] = _Words(tokenizer, vocab_size, stop_ids)
    return tokenizer.derived[key]


def _llguidance() -> Any:
    return require("llguidance", "constraints", "constrained output")


def _what_failed(error: str) -> str:
    if error.startswith("NoExtension"):
        return "the tokenizer has no token for what must come next"
    return f"it is too much for llguidance ({_reason(error)})"


def _reason(message: str) -> str:
    """What went wrong, out of a message of several lines with the text and a mark under the place."""
    lines = message.partition("<state>")[0].strip().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[0].strip()
