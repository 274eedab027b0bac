"""The output layer: logits, and the losses that never hold all of them.

B batch, T tokens, D hidden, V vocabulary, N positions with a label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of a position without loss."""


class Head(nn.Module):
    """hidden (..., D) -> logits (..., V). A head tied to an embedding holds no parameter: it reads the embedding's.

    A variant with other weights (LoRA, quantized) overrides `project` alone.
    """

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

    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) before the soft cap."""
        return F.linear(hidden, self.matrix)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in the dtype of hidden."""
        return _squeeze(self.project(hidden), self.softcap)

    def log_probs(self, hidden: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """log p(label) of every position in float32, (B, T); 0 where the label is -100.

        Logits exist for chunk_size positions at a time (0: all); the backward pass computes them again.
        """
        where, rows, targets = _with_label(hidden, labels)
        parts = [
            checkpoint(self._log_probs, part, target, use_reentrant=False)
            for part, target in zip(_chunks(rows, chunk_size), _chunks(targets, chunk_size))
        ]
        values = torch.cat(parts) if parts else hidden.sum().float() * 0 + hidden.new_zeros(0, dtype=torch.float32)
        return values.new_zeros(labels.numel()).index_copy(0, where, values).view_as(labels)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """Sum of -log p(label) over the positions whose label isn't -100: a float32 scalar.

        hidden (B, T, D), labels (B, T). The gradients are formed in the forward pass, chunk_size positions at a time
        (0: all), so neither pass holds more logits than that. Can be differentiated once.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.tied_to is not None and self.tied_to.weight.requires_grad:
            parameters.append(self.tied_to.weight)
        return _CrossEntropy.apply(self, hidden, labels, chunk_size, *parameters)

    def _log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = _squeeze(self.project(hidden).float(), self.softcap)
        return -F.cross_entropy(logits, labels, reduction="none")

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.vocab_size}, tied={self.tied_to is not None}, softcap={self.softcap}"


class _CrossEntropy(torch.autograd.Function):
    """The sum of -log p and, at once, its gradients."""

    @staticmethod
    def forward(ctx, head: Head, hidden: Tensor, labels: Tensor, chunk_size: int, *parameters: Tensor) -> Tensor:
        where, rows, targets = _with_label(hidden, labels)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = [hidden.requires_grad, *(True for _ in parameters)]
        wants_any = any(ctx.needs_input_grad)
        row_gradient = torch.empty_like(rows) if wants_any else None
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        step = chunk_size or max(len(rows), 1)
        plain = type(head).project is Head.project
        for start in range(0, len(rows), step):
            part, target = rows[start : start + step], targets[start : start + step]
            if plain:
                loss, gradient = _plain_chunk(head, part, target, wants_any, gradients)
            else:
                loss, gradient = _any_chunk(head, part, target, wants_any, parameters, gradients)
            total += loss
            if row_gradient is not None:
                row_gradient[start : start + step] = gradient
        if wants_any:
            hidden_gradient = torch.zeros_like(hidden).view(-1, hidden.shape[-1])
            ctx.gradients = [hidden_gradient.index_copy_(0, where, row_gradient).view_as(hidden), *gradients]
        del wanted
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("Head.cross_entropy can be differentiated only once")
        return None, gradients[0].mul_(scale), None, None, *(gradient.mul_(scale) for gradient in gradients[1:])


def _plain_chunk(head: Head, hidden: Tensor, labels: Tensor, wants_any: bool, gradients: list[Tensor]):
    """Loss and gradient of hidden (N, D) for a plain matrix; its own gradient is added to gradients[0] if there is one."""
    logits = _squeeze(head.project(hidden).float(), head.softcap)
    log_probs = torch.log_softmax(logits, -1)
    loss = -log_probs.gather(-1, labels[:, None]).sum()
    if not wants_any:
        return loss, None
    gradient = log_probs.exp_()
    gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
    if head.softcap is not None:
        gradient *= 1 - (logits / head.softcap).square_()
    gradient = gradient.to(hidden.dtype)
    if gradients:
        gradients[0].addmm_(gradient.t(), hidden)
    return loss, gradient @ head.matrix.detach()


def _any_chunk(head: Head, hidden: Tensor, labels: Tensor, wants_any: bool, parameters, gradients: list[Tensor]):
    """The same for a head with any projection, through autograd."""
    with torch.set_grad_enabled(wants_any):
        leaf = hidden.detach().requires_grad_(wants_any)
        loss = -head._log_probs(leaf, labels).sum()
    if not wants_any:
        return loss, None
    own, *others = torch.autograd.grad(loss, [leaf, *parameters])
    for total, gradient in zip(gradients, others):
        total += gradient
    return loss.detach(), own


def _with_label(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices (N,) of positions with a label, their hidden (N, D) and labels (N,): the rest needs no logits."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    where = (targets != IGNORED).nonzero().squeeze(-1)
    if len(where) == len(targets):
        return where, flat, targets
    return where, flat[where], targets[where]


def _chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    return rows.split(size or max(len(rows), 1)) if len(rows) else ()


def _squeeze(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
