"""The output layer: logits, and the losses that never hold all of them.

B batch, T tokens, D hidden, V vocabulary, N positions with a label, n of these at a time, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.nn.collectives import copied, gathered, shared_sum, summed
from tunesmith.nn.linear import linear

IGNORED = -100
"""Label of a position without loss."""


@dataclass(frozen=True)
class VocabularyShard:
    """Rows start to stop of the output matrix, which the ranks of a group hold together."""

    start: int
    stop: int
    group: dist.ProcessGroup

    def own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For labels (N,): their rows here (0 where they are elsewhere), and whether they are here."""
        is_own = (labels >= self.start) & (labels < self.stop)
        return torch.where(is_own, labels - self.start, 0), is_own

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """(..., V here) -> (..., V). The last ranks may hold fewer rows, so parts are filled up on the way."""
        most = -(-vocab_size // self.group.size())
        filled = F.pad(logits, (0, most - logits.shape[-1]))
        return gathered(filled, -1, self.group, sums=False)[..., :vocab_size]


ChunkLoss = Callable[["Head", Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Takes the head, logits (n, V) in float32 (of ranks that share the matrix: V here), which of the positions with a label they
belong to, and whether a gradient is wanted; gives sums (S,) over these positions, and the gradient (n, V) of the first of them
with respect to the logits, which it leaves as they are. It may be given no positions."""


class Head(nn.Module):
    """hidden (..., D) -> logits (..., V). A head tied to an embedding holds no parameter: it reads the embedding's.

    A variant with other weights (LoRA, quantized) overrides `project` alone. Under tensor parallelism a rank holds some rows
    of the matrix (`shard`); what the methods return is whole and the same on every rank.
    """

    shard: VocabularyShard | None = None

    def __init__(
        self, hidden_size: int, vocab_size: int, tied_to: nn.Embedding | None = None, softcap: float | None = None
    ):
        super().__init__()
        self.hidden_size, self.vocab_size, self.softcap = hidden_size, vocab_size, softcap
        self._tied_to = (tied_to,)  # in a tuple, or it would be registered as a submodule
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    @property
    def tied_to(self) -> nn.Embedding | None:
        return self._tied_to[0]

    @property
    def matrix(self) -> Tensor:
        """(V, D), the head's own weight or the embedding's."""
        return self.weight if self.tied_to is None else self.tied_to.weight

    def untie(self) -> None:
        """Give a tied head a matrix of its own, without values; whoever asks for it keeps it equal to the embedding's."""
        assert self.tied_to is not None
        self.weight = nn.Parameter(torch.empty_like(self.tied_to.weight))
        self._tied_to = (None,)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) before the soft cap; (..., V here) where ranks share the matrix."""
        return linear(hidden, self.matrix)

    def forward(self, hidden: Tensor, compute: str = "_logits", *arguments: Any) -> Tensor:
        """Every use of the head passes here, so that hooks on the module (fully_shard's) see it."""
        return getattr(self, compute)(hidden, *arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in the dtype of hidden."""
        return self(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = _squeeze(self.project(self._entered(hidden)), self.softcap)
        return logits if self.shard is None else self.shard.gather(logits, self.vocab_size)

    def log_probs(self, hidden: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """log p(label) of every position in float32, (B, T); 0 where the label is -100.

        Logits exist for chunk_size positions at a time (0: all); the backward pass computes them again.
        """
        # A view that left the module's forward would be one that fully_shard's hooks warn of.
        return self(hidden, "_log_probs", labels, chunk_size).view_as(labels)

    def _log_probs(self, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        where, rows, targets = _with_label(self._entered(hidden), labels)
        parts = [
            checkpoint(self._chunk_log_probs, part, target, use_reentrant=False)
            for part, target in zip(_chunks(rows, chunk_size), _chunks(targets, chunk_size))
        ]
        found = torch.zeros(labels.numel(), dtype=torch.float32, device=hidden.device)
        if not parts:  # the weights still get their gradient, 0: ranks that share them would wait for it
            row = rows.new_zeros(1, rows.shape[-1]) + self._entered(hidden)[..., :0].sum()
            return found + 0 * self._chunk_log_probs(row, targets.new_zeros(1))
        return found.index_copy(0, where, torch.cat(parts))

    def cross_entropy(self, hidden: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """Sum of -log p(label) over the positions whose label isn't -100: a float32 scalar.

        hidden (B, T, D), labels (B, T). The gradients are formed in the forward pass, chunk_size positions at a time
        (0: all), so neither pass holds more logits than that. Can be differentiated once.
        """
        return self.sums(hidden, labels, negative_log_probs(with_label(labels, labels)), chunk_size)[0]

    def sums(self, hidden: Tensor, labels: Tensor, loss: ChunkLoss, chunk_size: int = 1024) -> Tensor:
        """What `loss` sums up over the positions whose label isn't -100: (S,) float32, of which the first can be differentiated.

        Logits and gradients as in `cross_entropy`.
        """
        return self(hidden, "_sums", labels, loss, chunk_size)

    def precise_logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V) as losses take them: in float32 before the soft cap. Not to be differentiated."""
        return self(hidden, "_precise_logits")

    def _precise_logits(self, hidden: Tensor) -> Tensor:
        logits = _squeeze(self.project(hidden).float(), self.softcap)
        return logits if self.shard is None else self.shard.gather(logits, self.vocab_size)

    def logits_beside(self, other: Head, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, C) in float32: of the rows that `other` holds here those that both heads have, which are its first C."""
        logits = _squeeze(self.project(hidden).float(), self.softcap)
        if other.shard is None or self.vocab_size == other.vocab_size:  # which are then cut alike
            return logits[:, : other.vocab_size]
        assert self.shard is not None
        return self.shard.gather(logits, self.vocab_size)[:, other.shard.start : other.shard.stop]

    def _sums(self, hidden: Tensor, labels: Tensor, loss: ChunkLoss, chunk_size: int) -> Tensor:
        parameters: list[Tensor] = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.tied_to is not None and self.tied_to.weight.requires_grad:
            parameters.append(self.tied_to.weight)
        learns = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
        entered = self._entered(hidden)
        sums, own, others = _formed(self, entered, labels, loss, chunk_size, learns, parameters)
        if not learns:
            return sums
        # Two nodes, since a pipeline may ask for the gradients of hidden states first and of weights later. Of nodes made
        # later the backward pass comes first: `fully_shard` counts on the weights' being done when that of hidden comes out.
        first = _Formed.apply(sums[0], [own], entered)
        if parameters:
            first = first + _Formed.apply(torch.zeros_like(sums[0]), others, *parameters)
        return torch.cat([first[None], sums[1:]])  # type: ignore[index]

    def _entered(self, hidden: Tensor) -> Tensor:
        """Hidden states whose gradient is the sum of what the ranks' rows contribute."""
        return hidden if self.shard is None else copied(hidden, self.shard.group)

    def _chunk_log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _squeeze(self.project(hidden).float(), self.softcap)
        if self.shard is None:
            return -F.cross_entropy(logits, labels, reduction="none")
        return of_labels(log_softmax(logits, self.shard), labels, self.shard)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.vocab_size}, tied={self.tied_to is not None}, softcap={self.softcap}"


@torch.no_grad()
def _formed(
    head: Head, hidden: Tensor, labels: Tensor, loss: ChunkLoss, chunk_size: int, learns: bool, parameters: list[Tensor]
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The sums and, if it `learns`, at once the gradients of hidden and of the parameters."""
    where, rows, _ = _with_label(hidden, labels)
    chunk = _plain_chunk if type(head).project is Head.project else _any_chunk
    own, others = [], [torch.zeros_like(parameter) for parameter in parameters if learns]
    total: Any = 0.0
    for which in _slices(len(rows), chunk_size):
        sums, gradient = chunk(head, rows[which], which, loss, learns, parameters, others)
        total = total + sums
        own.append(gradient)
    if not learns:
        return total, None, others
    flat = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device).view(-1, hidden.shape[-1])
    flat.index_copy_(0, where, torch.cat(own).to(flat.dtype))
    return total, flat.view_as(hidden), others


class _Formed(torch.autograd.Function):
    """A value whose gradients, for each of `inputs`, were formed with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("a loss of Head can be differentiated only once")
        return None, None, *(gradient.mul_(scale) for gradient in gradients)


def _plain_chunk(head: Head, hidden: Tensor, which: slice, loss: ChunkLoss, learns: bool, parameters, gradients):
    """Sums and gradient of hidden (n, D) for a plain matrix; its own is added to gradients[0], if it is trained."""
    logits = _squeeze(head.project(hidden).float(), head.softcap)
    sums, gradient = loss(head, logits, which, learns)
    if gradient is None:
        return sums, None
    if head.softcap is not None:
        gradient *= 1 - (logits / head.softcap).square_()
    gradient = gradient.to(hidden.dtype)
    if gradients:
        gradients[0].addmm_(gradient.t(), hidden)
    return sums, gradient @ head.matrix.detach()


def _any_chunk(head: Head, hidden: Tensor, which: slice, loss: ChunkLoss, learns: bool, parameters, gradients):
    """The same for a head with any projection, through autograd."""
    with torch.set_grad_enabled(learns):
        leaf = hidden.detach().requires_grad_(learns)
        logits = _squeeze(head.project(leaf).float(), head.softcap)
    sums, gradient = loss(head, logits.detach(), which, learns)
    if gradient is None:
        return sums, None
    own, *others = torch.autograd.grad(logits, [leaf, *parameters], gradient)
    for total, one in zip(gradients, others):
        total += one
    return sums, own


def negative_log_probs(targets: Tensor) -> ChunkLoss:
    """Sums -log p of the positions' labels (N,)."""

    def loss(head: Head, logits: Tensor, which: slice, learns: bool) -> tuple[Tensor, Tensor | None]:
        log_probs, labels = log_softmax(logits, head.shard), targets[which]
        total = -of_labels(log_probs, labels, head.shard).sum()
        return total[None], negative_log_probs_gradient(log_probs, labels, head.shard) if learns else None

    return loss


def negative_log_probs_gradient(log_probs: Tensor, labels: Tensor, shard: VocabularyShard | None) -> Tensor:
    """That of logits (n, V): probabilities minus one at the label. Written over the log-probabilities."""
    gradient = log_probs.exp_()
    rows, is_own = (labels, torch.ones_like(labels)) if shard is None else shard.own(labels)
    return gradient.scatter_add_(-1, rows[:, None], -is_own.to(gradient.dtype)[:, None])


def log_softmax(logits: Tensor, shard: VocabularyShard | None) -> Tensor:
    """(N, V) or, where ranks share the vocabulary, (N, V here), normalized over all of it."""
    if shard is None:
        return torch.log_softmax(logits, -1)
    has_any = logits.shape[-1] > 0
    largest = logits.detach().amax(-1, keepdim=True) if has_any else logits.new_full((len(logits), 1), -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    shifted = logits - largest
    # A label counts on one rank only, so all ranks' gradients of what they share must be added up.
    return shifted - shared_sum(shifted.exp().sum(-1, keepdim=True), shard.group).log()


def of_labels(values: Tensor, labels: Tensor, shard: VocabularyShard | None) -> Tensor:
    """(N,) the value of each label out of (N, V), wherever its row is."""
    if shard is None:
        return values.gather(-1, labels[:, None]).squeeze(-1)
    rows, is_own = shard.own(labels)
    return summed(values.gather(-1, rows[:, None]).squeeze(-1) * is_own, shard.group)


def _with_label(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices (N,) of positions with a label, their hidden (N, D) and labels (N,): the rest needs no logits."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    where = (targets != IGNORED).nonzero().squeeze(-1)
    if len(where) == len(targets):
        return where, flat, targets
    return where, flat[where], targets[where]


def with_label(values: Tensor, labels: Tensor) -> Tensor:
    """(B, T, ...) -> (N, ...): of the positions whose label isn't -100, in the order in which a head takes them."""
    return values[labels != IGNORED]


def _slices(count: int, size: int) -> Iterator[slice]:
    """Of `size` positions each, 0: of all; at least one."""
    size = size or max(count, 1)
    yield from (slice(start, start + size) for start in range(0, max(count, 1), size))


def _chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.split(size or max(len(rows), 1)) if len(rows) else ()


def _squeeze(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
