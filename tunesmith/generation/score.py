"""What a model thinks of given continuations: their tokens' log-probabilities, and whether it would have written them.

N scored tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.generation.packed import packed_hidden
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.part import let_go

_CHUNK = 1024
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class Scored:
    """A continuation under the model."""

    log_probs: list[float]
    """Of each of its tokens, after the context and those before it."""
    is_greedy: bool
    """Whether every token is the likeliest one: greedy decoding would have written the continuation."""

    @property
    def log_prob(self) -> float:
        """Of the whole continuation."""
        return sum(self.log_probs)


def score(model: CausalLM, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int = 4096) -> list[Scored]:
    """Score (context ids, continuation ids) pairs, in their order. A context holds at least one token.

    batch_tokens: tokens that are computed at a time.
    """
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    inputs = ((pairs[index][0] + pairs[index][1])[:-1] for index in order)
    waiting, found = iter(order), {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for hidden, lengths in packed_hidden(model, inputs, batch_tokens):
                indices = [next(waiting) for _ in lengths]
                found.update(zip(indices, _scored(model, hidden, lengths, [pairs[index][1] for index in indices])))
    finally:
        let_go(model)
        model.train(was_training)
    return [found[index] for index in range(len(pairs))]


def _scored(model: CausalLM, hidden: Tensor, lengths: list[int], continuations: list[list[int]]) -> list[Scored]:
    """Of the continuations at the ends of sequences that stand one after another in hidden (T, D)."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    where = [place for end, own in zip(ends, continuations) for place in range(end - len(own), end)]
    labels = torch.tensor([token for own in continuations for token in own], device=hidden.device)
    values, is_likeliest = _of_labels(
        model, hidden[torch.tensor(where, device=hidden.device, dtype=torch.long)], labels
    )
    results, start = [], 0
    for own in continuations:
        part = slice(start, start + len(own))
        results.append(Scored(values[part], all(is_likeliest[part])))
        start += len(own)
    return results


def _of_labels(model: CausalLM, hidden: Tensor, labels: Tensor) -> tuple[list[float], list[bool]]:
    """log p of labels (N,) after hidden (N, D), and whether no other token is likelier."""
    values: list[float] = []
    is_likeliest: list[bool] = []
    for rows, targets in zip(hidden.split(_CHUNK), labels.split(_CHUNK)):
        log_probs = torch.log_softmax(model.lm_head.precise_logits(rows), -1)
        values += log_probs.gather(-1, targets[:, None]).squeeze(-1).tolist()
        is_likeliest += (log_probs.argmax(-1) == targets).tolist()
    return values, is_likeliest
