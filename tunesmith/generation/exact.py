"""Log-probabilities of finished sequences, to the bit as a training step computes them.

The engine's own agree with them to rounding: it multiplies rows of other batches, by other kernels. Where a ratio of two policies must
be exactly 1 before the first update, that is not enough.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.batch import IGNORED, Batch
from tunesmith.data.collate import TokenRow, collate
from tunesmith.models.decoder import CausalLM


def exact_log_probs(model: CausalLM, batch: Batch) -> Tensor:
    """log p of every label of a micro-batch, (B, T) float32, 0 where there is none: by the forward pass of a training step.

    Bits depend on what a pass holds: give the micro-batches that are trained on. Rotary frequencies that depend on the length are
    those of model.max_seq_len, as in training; of a model that was loaded, where it is None, those of the rows' own.
    """
    with torch.enable_grad():  # without it other kernels are taken
        hidden = model(batch.input_ids, batch.positions, batch.documents)
        return model.lm_head.log_probs(hidden, batch.labels).detach()


def log_probs_of(
    model: CausalLM, sequences: Sequence[tuple[list[int], list[int]]], pad_id: int, limit: int
) -> list[list[float]]:
    """Of the tokens after each prompt: (prompt ids, ids after it), each alone in a micro-batch of rows up to `limit` tokens."""
    found = []
    for prompt, ids in sequences:
        batch = collate([sequence_row(prompt, ids)], pad_id, False, limit)
        device = model.model.device
        batch = batch.map_tokens(lambda tokens, _: tokens.to(device))  # noqa: B023
        values = exact_log_probs(model, batch)[0]
        found.append(values[len(prompt) - 1 : len(prompt) - 1 + len(ids)].tolist())
    return found


def sequence_row(prompt: list[int], ids: list[int]) -> TokenRow:
    """The row on which a trainer learns `ids` after `prompt`: every token is an input but for the last."""
    tokens = np.array([*prompt, *ids], np.int64)
    labels = tokens[1:].copy()
    labels[: len(prompt) - 1] = IGNORED
    return TokenRow(tokens[:-1], labels, np.array([len(labels)]))
