"""Perplexity: how surprised a model is by texts.

T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
        return bounded_exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.nll / math.log(2) / self.bytes


def bounded_exp(value: float) -> float:
    """exp; infinite where that is beyond what a float holds."""
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads together: ids[:-1] are read, and the last `scored` of ids[1:] are what is predicted."""

    ids: list[int]
    scored: int

    @property
    def labels(self) -> list[int]:
        """For each token that is read: the one to predict, or -100."""
        return [IGNORED] * (len(self.ids) - 1 - self.scored) + self.ids[len(self.ids) - self.scored :]


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
    check_windows(model, max_length, stride)
    size = tokens = 0
    nll = 0.0

    def read() -> Iterator[Window]:
        nonlocal size
        for text in texts:
            size += len(text.encode())
            yield from windows(tokenizer.encode(text), max_length, stride)

    for losses in window_losses(model, read(), batch_tokens):
        tokens += len(losses)
        nll += losses.double().sum().item()
    if tokens == 0:
        raise UserError("perplexity: the texts have no token after a first one, so there is nothing to score")
    return Perplexity(nll, tokens, size)


def check_windows(model: CausalLM, max_length: int, stride: int | None) -> None:
    """Raise UserError for windows that the model can't read, or that leave gaps."""
    context = model.config.context_length
    if not 1 <= max_length <= context:
        raise UserError(f"perplexity: windows of {max_length} tokens; the model's context allows 1 to {context}")
    if stride is not None and not 1 <= stride <= max_length:
        raise UserError(f"perplexity: a stride of {stride} tokens; with windows of {max_length} it can be 1 to that")


def windows(ids: list[int], max_length: int, stride: int | None = None) -> Iterator[Window]:
    """Cut one text's ids: each but the first is scored in one window, in their order."""
    done = 1
    for start in range(0, len(ids), stride or max_length):
        if done >= len(ids):
            return
        end = min(start + max_length + 1, len(ids))
        yield Window(ids[start:end], end - done)
        done = end


def window_losses(model: CausalLM, of: Iterable[Window], batch_tokens: int = 4096) -> Iterator[Tensor]:
    """-log p of each window's scored tokens, (scored,) float32 on the host, in the windows' order."""
    waiting: list[Window] = []

    def read() -> Iterator[list[int]]:
        for window in of:
            waiting.append(window)
            yield window.ids[:-1]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for hidden, lengths in packed_hidden(model, read(), batch_tokens):
                batch = waiting[: len(lengths)]
                del waiting[: len(lengths)]
                labels = torch.tensor([label for window in batch for label in window.labels], device=hidden.device)
                losses = -model.lm_head.log_probs(hidden[None], labels[None])[0].cpu()
                yield from losses[labels.cpu() != IGNORED].split([window.scored for window in batch])
    finally:
        let_go(model)
        model.train(was_training)
