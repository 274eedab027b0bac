"""One optimizer step on the global batch, and the loss over a validation set.

A loss function takes (head, hidden, batch) and returns {term: (sum, unit)}: the sum of a term over a micro-batch, and
the name of what it is divided by; `batch.counts[unit]` says how many of those the micro-batch holds. The counts are
known before the first backward pass, so every micro-batch is divided by the count of the whole global batch, and the
update does not depend on how that was cut.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head
from tunesmith.parallel.memory import offload_activations
from tunesmith.parallel.mesh import LOSS, Mesh
from tunesmith.parallel.pipeline import forward, forward_backward, same_width
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
    num_seen: int = 0
    """Pairs (token, token it sees) over all layers: what attention costs."""
    skipped: bool = False
    terms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def global_counts(batches: Iterable[Batch], mesh: Mesh, windows: Iterable[int | None] = ()) -> dict[str, int]:
    """How many units of each kind the global batch holds, over all micro-batches and ranks; `windows`: of the model's layers."""
    local: Counter[str] = Counter()
    layers = Counter(windows)
    for batch in batches:
        local.update(batch.counts)
        local["processed"] += batch.num_tokens
        local["seen"] += sum(count * batch.num_seen(window) for window, count in layers.items())
    names = sorted(local)
    return dict(zip(names, map(int, mesh.sum([local[name] for name in names]))))


def train_step(
    model: CausalLM, optimizer: Optimizer, batches: list[Batch], loss_fn: LossFunction, mesh: Mesh, step: int
) -> StepStats:
    """Update `model` once on the mean of every loss term over the global batch.

    Raises UserError when loss or gradient is not finite, unless the optimizer was told to skip such steps.
    """
    started = time.perf_counter()
    counts = global_counts(batches, mesh, model.config.layer_windows)
    lr = optimizer.set_step(step)
    sums: dict[str, Tensor] = {}

    def mean_loss(hidden: Tensor, batch: Batch) -> Tensor:
        terms = loss_fn(model.lm_head, hidden, batch)
        means = {name: value / max(counts[unit], 1) for name, (value, unit) in terms.items()}
        for name, value in means.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        return optimizer.scaled(torch.stack(list(means.values())).sum())

    own = [own_tokens(model, batch, mesh).to(mesh.device) for batch in same_width(batches, mesh)]
    forward_backward(model, own, mean_loss, lambda: _computing(optimizer, mesh))
    totals = _sum_terms({name: float(value) for name, value in sums.items()}, mesh)
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
        num_seen=counts["seen"],
        skipped=not applied,
        terms=totals,
        seconds=time.perf_counter() - started,
    )


def _sum_terms(sums: dict[str, float], mesh: Mesh) -> dict[str, float]:
    """Of every term over all ranks; ranks that compute no loss (stages of a pipeline) learn the names."""
    names = (
        list(dict.fromkeys(name for own in mesh.ranks.gather(list(sums)) for name in own))
        if mesh.size("pp") > 1
        else list(sums)
    )
    return dict(zip(names, mesh.sum([sums.get(name, 0.0) for name in names], LOSS)))


def own_tokens(model: CausalLM, batch: Batch, mesh: Mesh) -> Batch:
    """The batch with rows as long as the mesh can cut them, and of those the tokens of this rank."""
    shards = model.sequence_shards
    multiple = (shards.chunks if shards else 1) * mesh.size("tp")
    batch = batch.padded_to(-(-batch.input_ids.shape[1] // multiple) * multiple)
    return batch if shards is None else batch.map_tokens(lambda tokens, _: shards.own(tokens))


@contextlib.contextmanager
def _computing(optimizer: Optimizer, mesh: Mesh) -> Iterator[None]:
    """The context of a forward pass whose activations are kept."""
    with optimizer.precision(), offload_activations(optimizer.config.enable_activation_offloading, mesh.device):
        yield


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
    units: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for micro_batches in batches:
        for batch in micro_batches:
            counts.update(batch.counts)

        def loss_sums(hidden: Tensor, batch: Batch) -> None:
            for name, (value, unit) in loss_fn(model.lm_head, hidden, batch).items():
                sums[name] += float(value)
                units[name] = unit

        own = [own_tokens(model, batch, mesh).to(mesh.device) for batch in micro_batches]
        forward(model, own, loss_sums, optimizer.precision)
    model.train(was_training)
    units = dict(pair for own in mesh.ranks.gather(list(units.items())) for pair in own)
    totals = _sum_terms(sums, mesh)
    names = sorted(counts)
    over_all = dict(zip(names, mesh.sum([counts[name] for name in names])))
    return sum(total / max(over_all[units[name]], 1) for name, total in totals.items())
