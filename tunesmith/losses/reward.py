"""Losses of models that score texts or tokens.

P pairs, N texts or tokens, L labels. Numbers are float32 inside (float64 stays). A loss is one number a pair, text or token:
its mean over the global batch is the caller's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """The probability that people prefer one answer to another is σ of the difference of their rewards (Bradley and Terry 1952):
    -log σ(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)², all (P,).

    margin: how much better the chosen answer is, from ratings (arXiv 2307.09288, eq. 2). centring: rewards are known up to a
    constant only; this draws their sum to 0 (arXiv 2312.09244, section 5.2; TRL's center_rewards_coefficient, 0.01 there).
    """
    chosen, rejected = _wide(chosen), _wide(rejected)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + centring * (chosen + rejected).square()


def class_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(scores)[label]: scores (N, L), labels (N,) -> (N,).

    For texts, their class; for the steps of an answer, whether they are right (arXiv 2305.20050, section 2.6).
    """
    return F.cross_entropy(_wide(scores), labels, reduction="none")


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.itemsize > 4 else numbers.float()
