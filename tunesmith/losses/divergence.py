"""How far a student's distribution is from its teacher's.

p the teacher's distribution, q the student's; n positions, C classes. Each function takes log p and log q (n, C) and gives the
divergence's summands over the classes given, (n,), and its derivative with respect to log q, (n, C): where ranks share the
classes, each has some of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student covers all that the teacher may say (Hinton et al., arXiv 1503.02531)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), p.neg_()


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student keeps to what the teacher is likely to say (MiniLLM, arXiv 2306.08543)."""
    q, ratio = log_q.exp(), log_q - log_p
    return (q * ratio).sum(-1), q.mul_(ratio.add_(1))


def symmetric_kl(forward_ratio: float) -> Divergence:
    """forward_ratio KL(p || q) + (1 - forward_ratio) KL(q || p)."""

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
        values, slopes = (a * forward_ratio + b * (1 - forward_ratio) for a, b in zip(forward, reverse))
        return values, slopes

    return divergence


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m) with the mixture m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1), 0 < beta < 1."""

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_m = (log_p + math.log(beta)).logaddexp(log_q + math.log1p(-beta))
        ratio, q = log_q - log_m, log_q.exp()
        slope = q.mul_(ratio).mul_(1 - beta)
        return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + slope.sum(-1), slope

    return divergence
