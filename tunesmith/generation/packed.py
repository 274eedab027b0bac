"""Finished token sequences through the model without a cache: several in one row, none of which sees another.

T tokens of a row, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tunesmith.models.decoder import CausalLM


def packed_hidden(
    model: CausalLM, sequences: Iterable[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Hidden states of `sequences`, in their order: (T, D) of one row, and how many tokens each sequence in it has.

    A row has at most batch_tokens tokens, or one sequence that is longer. Gradients are the caller's business.
    """
    alone = model.config.depends_on_length  # rotary frequencies would be those of the longest neighbour
    row: list[Sequence[int]] = []
    for ids in sequences:
        if row and (alone or sum(map(len, row)) + len(ids) > batch_tokens):
            yield _hidden(model, row)
            row = []
        row.append(ids)
    if row:
        yield _hidden(model, row)


def _hidden(model: CausalLM, row: list[Sequence[int]]) -> tuple[Tensor, list[int]]:
    lengths = [len(ids) for ids in row]
    device = model.model.device
    ids = torch.tensor([[token for ids in row for token in ids]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    if len(row) == 1:
        return model(ids, positions=positions)[0], lengths
    documents = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(lengths))[None].to(device)
    return model(ids, positions=positions, documents=documents)[0], lengths
