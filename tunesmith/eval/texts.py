"""Perplexity of text files, with what a comparison of two models needs: losses by parts of the text that no tokenizer decides."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.files import read_file
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.eval.perplexity import Perplexity, Window, bounded_exp, check_windows, window_losses, windows
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.mesh import Replicas

_BLOCK = 1000
"""Characters that a block has at least; it ends with a line where one ends soon."""


@dataclass(frozen=True)
class Block:
    """A part of a text."""

    nll: float
    """Of the tokens that begin in it, in nats."""
    bytes: int


@dataclass(frozen=True)
class TextScore:
    """A model's surprise at one file."""

    file: str
    nll: float
    tokens: int
    words: int
    bytes: int
    blocks: list[Block]

    def row(self) -> dict[str, Any]:
        """What is told of it: perplexities by token, word and byte."""
        own = Perplexity(self.nll, self.tokens, self.bytes)
        values = {name: value for name, value in asdict(self).items() if name != "blocks"}
        return values | {
            "perplexity": own.perplexity,
            "word_perplexity": bounded_exp(self.nll / self.words),
            "byte_perplexity": bounded_exp(self.nll / self.bytes),
            "bits_per_byte": own.bits_per_byte,
        }


@dataclass(frozen=True)
class _Text:
    """One text, cut for the model and into blocks."""

    windows: list[Window]
    starts: list[int]
    """Of each token after the first: the character it begins with."""
    edges: list[int]
    """Where blocks begin, as characters."""
    sizes: list[int]
    """Of the blocks in bytes."""


def read_texts(file: str, option: str = "perplexity") -> list[str]:
    """The texts of a file: the whole of it, or each row's `text`. Raises UserError, naming the `option`, where there are none."""
    texts: list[str] = []
    for rows in read_file(Path(file).expanduser()).values():
        for index in range(len(rows)):
            text = rows[index].get("text")
            if not isinstance(text, str):
                raise UserError(f"`{option}`: {rows.place(index)}: there is no `text`, which is what is read")
            texts.append(text)
    if not any(text.strip() for text in texts):
        raise UserError(f"`{option}`: {file} holds no text")
    return texts


def score_file(
    model: CausalLM,
    tokenizer: Tokenizer,
    file: str,
    texts: list[str],
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
    replicas: Replicas | None = None,
) -> TextScore:
    """Perplexity of the `texts` of a file; of several replicas each scores some windows, and all get the result."""
    replicas = replicas or Replicas()
    check_windows(model, max_length, stride)
    cut = [_cut(text, tokenizer, max_length, stride) for text in texts]
    losses = iter(_losses(model, [window for text in cut for window in text.windows], batch_tokens, replicas))
    blocks: list[Block] = []
    tokens = 0
    for text in cut:
        own = [loss for _ in text.windows for loss in next(losses)]
        blocks += _blocks(text, own)
        tokens += len(own)
    if tokens == 0:
        raise UserError(f"`perplexity`: {file} has no token after a first one, so there is nothing to score")
    words = sum(len(re.split(r"\s+", text.strip())) for text in texts if text.strip())
    return TextScore(
        file, sum(block.nll for block in blocks), tokens, words, sum(len(t.encode()) for t in texts), blocks
    )


def _losses(model: CausalLM, of: list[Window], batch_tokens: int, replicas: Replicas) -> Iterator[list[float]]:
    own, count = replicas.own(of), replicas.count
    shares = replicas.on_all(lambda: [one.tolist() for one in window_losses(model, own, batch_tokens)])
    return (shares[index % count][index // count] for index in range(len(of)))


def _cut(text: str, tokenizer: Tokenizer, max_length: int, stride: int | None) -> _Text:
    encoding = tokenizer.backend.encode(text)
    edges = [0]
    while len(text) - edges[-1] > 2 * _BLOCK:
        line = text.find("\n", edges[-1] + _BLOCK, edges[-1] + 2 * _BLOCK)
        edges.append(line + 1 if line >= 0 else edges[-1] + _BLOCK)
    sizes = [len(text[begin:end].encode()) for begin, end in zip(edges, [*edges[1:], len(text)])]
    starts = [begin for begin, _ in encoding.offsets[1:]]
    return _Text(list(windows(encoding.ids, max_length, stride)), starts, edges, sizes)


def _blocks(text: _Text, losses: list[float]) -> list[Block]:
    sums = [0.0] * len(text.edges)
    for start, loss in zip(text.starts, losses, strict=True):
        sums[bisect_right(text.edges, start) - 1] += loss
    return [Block(nll, size) for nll, size in zip(sums, text.sizes)]
