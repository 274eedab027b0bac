"""The loss of a student's logits beside a teacher's: a divergence mixed with cross-entropy.

N positions with a label, n of them at a time, V the student's vocabulary, C classes that teacher and student share: the first
rows of both matrices. Where ranks share the vocabulary, V and C are those here. K likeliest tokens of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.losses.divergence import Divergence
from tunesmith.nn.collectives import summed
from tunesmith.nn.head import Head, VocabularyShard, log_softmax, negative_log_probs_gradient, of_labels


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's distribution: its likeliest tokens, and what the others have together as one further class.

    The divergence between the two distributions over these K + 1 classes is exact; it is never more than the whole one, and
    equal to it with K = C or where teacher and student share the rest out alike. Cross-entropy is that of all tokens.
    """

    ids: Tensor
    """(n, K) int64."""
    log_probs: Tensor
    """(n, K + 1), the last that of all others; (n, K) where there are no others."""


Guide = Callable[[Head, slice], Tensor | TopK]
"""Takes the student's head and which of the positions with a label; gives the teacher's logits (n, C) there, or the likeliest."""


@dataclass(frozen=True)
class Distillation:
    """kd_ratio * divergence + (1 - kd_ratio) * cross-entropy, a ChunkLoss: sums of that, of the divergence and of cross-entropy."""

    guide: Guide
    targets: Tensor
    """(N,) the labels."""
    divergence: Divergence
    shared: int
    """Classes that both have, over all ranks."""
    kd_ratio: float = 0.5
    temperature: float = 1.0
    """Logits of both are divided by it; as in GKD the loss isn't multiplied by its square."""

    def __call__(self, head: Head, logits: Tensor, which: slice, learns: bool) -> tuple[Tensor, Tensor | None]:
        shard, labels, ratio = head.shard, self.targets[which], self.kd_ratio
        log_probs = log_softmax(logits, shard)
        cross_entropy = -of_labels(log_probs, labels, shard).sum()
        here = self.shared if shard is None else min(max(self.shared - shard.start, 0), logits.shape[-1])
        is_plain = self.temperature == 1 and self.shared == head.vocab_size
        log_q = log_probs if is_plain else log_softmax(logits[:, :here] / self.temperature, shard)
        teacher = self.guide(head, which)
        if isinstance(teacher, TopK):
            divergence, gradient = _from_top(self.divergence, teacher, log_q, shard)
        else:
            divergence, gradient = _from_logits(self.divergence, teacher / self.temperature, log_q, shard)
        sums = torch.stack([ratio * divergence + (1 - ratio) * cross_entropy, divergence, cross_entropy])
        if not learns:
            return sums, None
        total = negative_log_probs_gradient(log_probs, labels, shard).mul_(1 - ratio)
        total[:, :here] += gradient.mul_(ratio / self.temperature)
        return sums, total


def _from_logits(
    divergence: Divergence, logits: Tensor, log_q: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """The divergence from all of the teacher's logits (n, C), and its gradient with respect to what log q (n, C) is the log-softmax of."""
    values, slope = divergence(log_softmax(logits, shard), log_q)
    all_slopes = _over(slope.sum(-1, keepdim=True), shard)
    return _over(values.sum(), shard), slope.sub_(log_q.exp().mul_(all_slopes))


def _from_top(
    divergence: Divergence, teacher: TopK, log_q: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """The same from its likeliest tokens: the student's other tokens count as one class, too, whose slope each has by its share."""
    ids, q = teacher.ids, log_q.exp()
    rows, is_own = (ids, torch.ones_like(ids, dtype=torch.bool)) if shard is None else shard.own(ids)
    log_known = _over(log_q.gather(-1, rows).masked_fill_(~is_own, 0), shard)
    if teacher.log_probs.shape[-1] == ids.shape[-1]:
        values, slope = divergence(teacher.log_probs, log_known)
        all_slopes, of_others = slope.sum(-1, keepdim=True), torch.zeros_like(slope[:, :1])
    else:
        is_known = torch.zeros_like(q, dtype=torch.int8).scatter_add_(-1, rows, is_own.to(torch.int8))
        others = _over(q.masked_fill(is_known > 0, 0).sum(-1, keepdim=True), shard).clamp_min_(1e-38)
        values, slope = divergence(teacher.log_probs, torch.cat([log_known, others.log()], -1))
        all_slopes = slope.sum(-1, keepdim=True)
        slope, of_others = slope[:, :-1], slope[:, -1:] / others
    own = (slope - log_known.exp() * of_others).masked_fill_(~is_own, 0)
    return values.sum(), q.mul_(of_others - all_slopes).scatter_add_(-1, rows, own)


def _over(value: Tensor, shard: VocabularyShard | None) -> Tensor:
    return value if shard is None else summed(value, shard.group)
