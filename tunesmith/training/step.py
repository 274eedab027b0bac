"""One optimizer step on the global batch, and the loss over a validation set.

A loss function takes (head, hidden, batch) and returns {term: (sum, unit)}: the sum of a term over a micro-batch, and
the name of what it is divided by; `batch.counts[unit]` says how many of those the micro-batch holds. The counts are
known before the first backward pass, so every micro-batch is divided by the count of the whole global batch, and the
update does not depend on how that was cut.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head
from tunesmith.parallel.memory import offload_activations
from tunesmith.parallel.mesh import Mesh
from tunesmith.training.optim import Optimizer

LossFunction = Callable[[Head, Tensor, Batch], dict[str, tuple[Tensor, str]]]


@dataclass
class StepStats:
    """What a step did, over all ranks. `loss` is the sum of the mean `terms`."""

    loss: float
    grad_norm: float | None
    lr: float
    num_tokens: int
    """Tokens processed, padding included."""
    num_trained: int
    """Tokens with a loss."""
    skipped: bool = False
    terms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def global_counts(batches: Iterable[Batch], mesh: Mesh) -> dict[str, int]:
    """How many units of each kind the global batch holds, over all micro-batches and ranks."""
    local: Counter[str] = Counter()
    for batch in batches:
        local.update(batch.counts)
        local["processed"] += batch.num_tokens
    names = sorted(local)
    return dict(zip(names, map(int, mesh.sum([local[name] for name in names]))))


def train_step(
    model: CausalLM, optimizer: Optimizer, batches: list[Batch], loss_fn: LossFunction, mesh: Mesh, step: int
) -> StepStats:
    """Update `model` once on the mean of every loss term over the global batch.

    Raises UserError when loss or gradient is not finite, unless the optimizer was told to skip such steps.
    """
    started = time.perf_counter()
    counts = global_counts(batches, mesh)
    lr = optimizer.set_step(step)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        batch = batch.to(mesh.device)
        with optimizer.precision(), offload_activations(optimizer.config.enable_activation_offloading, mesh.device):
            hidden = model(batch.input_ids, batch.positions, batch.documents)
            terms = loss_fn(model.lm_head, hidden, batch)
            means = {name: value / max(counts[unit], 1) for name, (value, unit) in terms.items()}
            loss = torch.stack(list(means.values())).sum()
        optimizer.backward(loss)
        for name, value in means.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    totals = dict(zip(sums, mesh.sum([float(value) for value in sums.values()])))
    loss_value = sum(totals.values())
    grad_norm, applied = optimizer.step(finite_loss=math.isfinite(loss_value))
    if not applied and not optimizer.config.skip_nonfinite_steps and not optimizer.may_skip:
        raise UserError(
            f"step {step}: the {'loss' if not math.isfinite(loss_value) else 'gradient norm'} is not finite "
            f"(loss {loss_value}, gradient norm {grad_norm}); no update was made: {_advice(step)}"
        )
    return StepStats(
        loss=loss_value,
        grad_norm=grad_norm,
        lr=lr,
        num_tokens=counts["processed"],
        num_trained=counts["tokens"],
        skipped=not applied,
        terms=totals,
        seconds=time.perf_counter() - started,
    )


def _advice(step: int) -> str:
    if step == 1:
        return "nothing was trained yet, so look whether the weights are whole, or use another `dtype`"
    return (
        "lower `optimizer.lr`, set `clip_grad_norm`, use `dtype: bf16` or `fp32`, or pass such steps with "
        "`skip_nonfinite_steps: true`"
    )


@torch.no_grad()
def validation_loss(
    model: CausalLM, optimizer: Optimizer, batches: Iterable[list[Batch]], loss_fn: LossFunction, mesh: Mesh
) -> float:
    """The mean loss over all `batches`, each unit weighted the same; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for micro_batches in batches:
        for batch in micro_batches:
            batch = batch.to(mesh.device)
            with optimizer.precision():
                terms = loss_fn(model.lm_head, model(batch.input_ids, batch.positions, batch.documents), batch)
            for name, (value, unit) in terms.items():
                sums[name] += float(value)
                counts[name] += batch.counts[unit]
    model.train(was_training)
    names = sorted(sums)
    totals = mesh.sum([sums[name] for name in names] + [counts[name] for name in names])
    return sum(total / max(count, 1) for total, count in zip(totals, totals[len(names) :]))
