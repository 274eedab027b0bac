"""One optimizer step on the global batch, and the loss over a validation set.

A loss function takes (head, hidden, batch) and returns {term: (sum, unit)}: the sum of a term over a micro-batch, and
the name of what it is divided by; `batch.counts[unit]` says how many of those the micro-batch holds. The counts are
known before the first backward pass, so every micro-batch is divided by the count of the whole global batch, and the
update does not depend on how that was cut. A `Metric` among them is averaged alike and logged, and is no part of the loss.

What a loss needs of the batches beforehand, such as a reference's log-probabilities, `prepare` writes into their `extra`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tunesmith.data.batch import Batch
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.memory import offload_activations
from tunesmith.parallel.mesh import LOSS, Mesh
from tunesmith.parallel.pipeline import forward, forward_backward, same_width
from tunesmith.training.optim import Optimizer

Key = TypeVar("Key", bound=tuple)


class Metric(NamedTuple):
    """Something to log: its sum over a micro-batch, and the unit it is averaged over; left out of a step that has none of them."""

    sum: Tensor
    unit: str


LossFunction = Callable[[Any, Tensor, Batch], Mapping[str, tuple[Tensor, str]]]
"""Takes (head, hidden, batch): the model's output layer, of whatever kind it is."""
Prepare = Callable[[list[Batch]], None]
"""Takes the micro-batches of a step as this rank sees them: on its device, and of shared rows its own tokens."""


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
    metrics: dict[str, float] = field(default_factory=dict)
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
    model: CausalLM,
    optimizer: Optimizer,
    batches: list[Batch],
    loss_fn: LossFunction,
    mesh: Mesh,
    step: int,
    prepare: Prepare | None = None,
) -> StepStats:
    """Update `model` once on the mean of every loss term over the global batch.

    Raises UserError when loss or gradient is not finite, unless the optimizer was told to skip such steps.
    """
    started = time.perf_counter()
    counts = global_counts(batches, mesh, model.config.layer_windows)
    lr = optimizer.set_step(step)
    sums: dict[tuple[str, bool], Tensor] = {}

    def mean_loss(hidden: Tensor, batch: Batch) -> Tensor:
        terms = []
        for name, pair in loss_fn(model.head, hidden, batch).items():
            is_term, count = not isinstance(pair, Metric), counts[pair[1]]
            if not count and not is_term:
                continue  # a mean over nothing is no number
            value = pair[0] / max(count, 1)
            sums[name, is_term] = sums.get((name, is_term), 0.0) + value.detach()
            if is_term:
                terms.append(value)
        return optimizer.scaled(torch.stack(terms).sum())

    own = own_batches(model, batches, mesh)
    if prepare is not None:
        prepare(own)
    forward_backward(model, own, mean_loss, lambda: _computing(optimizer, mesh))
    totals = _sum_over_ranks({key: float(value) for key, value in sums.items()}, mesh)
    terms = {name: value for (name, is_term), value in totals.items() if is_term}
    loss_value = sum(terms.values())
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
        terms=terms,
        metrics={name: value for (name, is_term), value in totals.items() if not is_term},
        seconds=time.perf_counter() - started,
    )


def _sum_over_ranks(sums: Mapping[Key, float], mesh: Mesh) -> dict[Key, float]:
    """Each over all ranks; ranks that compute no loss (stages of a pipeline) learn the keys."""
    keys = (
        list(dict.fromkeys(key for own in mesh.ranks.gather(list(sums)) for key in own))
        if mesh.size("pp") > 1
        else list(sums)
    )
    return dict(zip(keys, mesh.sum([sums.get(key, 0.0) for key in keys], LOSS)))


def own_batches(model: CausalLM, batches: Iterable[Batch], mesh: Mesh) -> list[Batch]:
    """The micro-batches of a step as this rank takes them: on its device, all of one width where a pipeline asks for it."""
    return [own_tokens(model, batch, mesh).to(mesh.device) for batch in same_width(list(batches), mesh)]


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
def validation_means(
    model: CausalLM,
    optimizer: Optimizer,
    batches: Iterable[list[Batch]],
    loss_fn: LossFunction,
    mesh: Mesh,
    prepare: Prepare | None = None,
) -> dict[str, float]:
    """The mean `loss` over all `batches`, its terms where there are several, and the metrics, each unit weighted the same.

    The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    sums: dict[tuple[str, str, bool], float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for micro_batches in batches:
        for batch in micro_batches:
            counts.update(batch.counts)

        def add_sums(hidden: Tensor, batch: Batch) -> None:
            for name, pair in loss_fn(model.head, hidden, batch).items():
                sums[name, pair[1], not isinstance(pair, Metric)] += float(pair[0])

        own = own_batches(model, micro_batches, mesh)
        if prepare is not None:
            prepare(own)
        forward(model, own, add_sums, optimizer.precision)
    model.train(was_training)
    totals = _sum_over_ranks(sums, mesh)
    names = sorted(counts)
    over_all = dict(zip(names, mesh.sum([counts[name] for name in names])))
    means = {
        (name, is_term): total / max(over_all[unit], 1)
        for (name, unit, is_term), total in totals.items()
        if is_term or over_all[unit]
    }
    terms = {name: mean for (name, is_term), mean in means.items() if is_term}
    metrics = {name: mean for (name, is_term), mean in means.items() if not is_term}
    return {"loss": sum(terms.values())} | (terms if len(terms) > 1 else {}) | metrics
