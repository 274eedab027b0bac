"""Which activations are kept, recomputed or moved."""

import torch
from torch import nn

from tunesmith.parallel import memory
from tunesmith.parallel.memory import OffloadActivations, apply_activation_checkpointing


def test_the_same_operators_are_kept_in_every_pass(monkeypatch):
    """Three products a layer, an odd number: a counter that went on would keep the others in the second pass."""
    kept, policy = [], memory._keep_costly

    def watched():
        decide = policy()

        def watch(context, operator, *args, **kwargs):
            decision = decide(context, operator, *args, **kwargs)
            if operator in memory._MATMULS:
                kept.append(decision)
            return decision

        return watch

    monkeypatch.setattr(memory, "_keep_costly", watched)
    layer = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    apply_activation_checkpointing([layer], "selective", "op")
    passes = []
    for _ in range(2):
        kept.clear()
        layer(torch.ones(2, 4)).sum().backward()
        passes.append(list(kept))
    assert passes[0] == passes[1]


def test_weights_are_not_moved_with_the_activations(monkeypatch):
    """A product keeps the transposed view of a weight: that is no activation."""
    moved = []

    real = torch.empty

    def noting(*args, **kwargs):
        moved.append(args[0])
        kwargs.pop("pin_memory", None)
        return real(*args, **kwargs)

    monkeypatch.setattr(memory, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(memory.torch, "empty", noting)
    weights = [nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(4, 8), requires_grad=False)]
    hidden = torch.ones(3, 2, 4, requires_grad=True)
    with OffloadActivations(min_bytes=0):
        for weight in weights:
            hidden = nn.functional.linear(hidden, weight).sin()
    hidden.sum().backward()
    assert moved and torch.Size((8, 4)) not in moved and torch.Size((4, 8)) not in moved
