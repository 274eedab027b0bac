"""Perplexity: how surprised a model is by texts.

T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.packed import packed_hidden
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import IGNORED
from tunesmith.nn.part import let_go


@dataclass(frozen=True)
class Perplexity:
    """The surprise of a model at texts, summed up over their tokens."""

    nll: float
    """Sum of -log p over the scored tokens, in nats."""
    tokens: int
    """How many were scored: all but the first of each text (which mostly is bos)."""
    bytes: int
    """Length of the texts in UTF-8."""

    @property
    def perplexity(self) -> float:
        """Per token: exp of the mean; infinite where that is beyond what a float holds."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.nll / math.log(2) / self.bytes


@dataclass(frozen=True)
class _Window:
    """Tokens that the model reads together: ids[:-1] are read, and the last `scored` of ids[1:] are what is predicted."""

    ids: list[int]
    scored: int


def perplexity(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> Perplexity:
    """Every token after the first of each text is scored once, given up to max_length tokens before it.

    Args:
        max_length: tokens of a text that the model reads at a time.
        stride: by how many tokens a window of a longer text lies after the one before; the overlap is context only, so
            every token but those of the first window is predicted from at least max_length - stride tokens. None:
            max_length, windows without overlap.
        batch_tokens: tokens that are computed at a time.

    Raises UserError where there is nothing to score or a number is out of range.
    """
    _check(model, max_length, max_length if stride is None else stride)
    size = nll = tokens = 0
    windows: list[_Window] = []

    def read() -> Iterator[list[int]]:
        nonlocal size
        for text in texts:
            size += len(text.encode())
            for window in _windows(tokenizer.encode(text), max_length, max_length if stride is None else stride):
                windows.append(window)
                yield window.ids[:-1]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for hidden, lengths in packed_hidden(model, read(), batch_tokens):
                labels = torch.tensor([label for window in windows[: len(lengths)] for label in _labels(window)])
                log_probs = model.lm_head.log_probs(hidden[None], labels[None].to(hidden.device))
                nll -= log_probs.double().sum().item() if log_probs.device.type != "mps" else log_probs.sum().item()
                tokens += sum(window.scored for window in windows[: len(lengths)])
                del windows[: len(lengths)]
    finally:
        let_go(model)
        model.train(was_training)
    if tokens == 0:
        raise UserError("perplexity: the texts have no token after a first one, so there is nothing to score")
    return Perplexity(nll, tokens, size)


def _check(model: CausalLM, max_length: int, stride: int) -> None:
    context = model.config.context_length
    if not 1 <= max_length <= context:
        raise UserError(f"perplexity: windows of {max_length} tokens; the model's context allows 1 to {context}")
    if not 1 <= stride <= max_length:
        raise UserError(f"perplexity: a stride of {stride} tokens; with windows of {max_length} it can be 1 to that")


def _windows(ids: list[int], max_length: int, stride: int) -> Iterator[_Window]:
    """Cut one text's ids; each but the first is scored in one window only."""
    done = 1
    for start in range(0, len(ids), stride):
        if done >= len(ids):
            return
        end = min(start + max_length + 1, len(ids))
        yield _Window(ids[start:end], end - done)
        done = end


def _labels(window: _Window) -> list[int]:
    return [IGNORED] * (len(window.ids) - 1 - window.scored) + window.ids[len(window.ids) - window.scored :]
