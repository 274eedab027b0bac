"""Losses that learn from answers which people prefer or reject. A loss is a function here and a line in a table at the end.

P pairs, N answers. log p is the sum over the answer's tokens of their log-probability, in nats; a log-ratio is log p under
the policy minus log p under the reference; σ is the logistic function. Numbers are float32 inside (float64 stays).
A loss is one number a pair or an answer: its mean over the global batch is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Two answers to each prompt: log p of both under the policy, their tokens, log p under the reference; all (P,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """Single answers: log p under the policy, tokens, whether it is a good one (bool), log p under the reference; all (N,)."""

    logps: Tensor
    length: Tensor
    desirable: Tensor
    reference: Tensor | None = None


class Outcome(NamedTuple):
    """Losses (P,), and what the method takes for the rewards of both answers (P,), without gradient: for metrics."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0, length_normalised: bool = False) -> Outcome:
    """Direct preference optimization (arXiv 2305.18290, eq. 7): -log σ(m), m = beta (chosen log-ratio - rejected log-ratio).

    beta: how closely the policy is held to the reference. label_smoothing e, the share of pairs labelled the wrong way
    round, gives the conservative form, -(1 - e) log σ(m) - e log σ(-m). Reward: beta · log-ratio.
    """
    scores = _scores(pairs, against_reference=True, length_normalised=length_normalised)
    return _outcome(_negative_log_sigmoid(beta * scores.margin, label_smoothing), beta, scores)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float, length_normalised: bool = False) -> Outcome:
    """DPO, unbiased where a share e of the labels is flipped (arXiv 2403.00409): ((1 - e) L(m) - e L(-m)) / (1 - 2 e), L = -log σ.

    beta, m and reward: as for `dpo`. 0 <= label_smoothing < 0.5. Unlike the others the loss has no lower bound for e > 0.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
    scores = _scores(pairs, against_reference=True, length_normalised=length_normalised)
    margin = beta * scores.margin
    as_labelled, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    losses = (label_smoothing * flipped - (1 - label_smoothing) * as_labelled) / (1 - 2 * label_smoothing)
    return _outcome(losses, beta, scores)


def ipo(pairs: Pairs, *, beta: float) -> Outcome:
    """Identity preference optimization (arXiv 2310.12036, eq. 17): (h - 1 / (2 beta))², h = chosen log-ratio - rejected log-ratio.

    beta (the paper's tau): the margin aimed at is 1 / (2 beta), so a larger one stays closer to the reference. Log-ratios are
    averages over tokens, as in TRL, whose source says that the authors' results are of this form; the paper's formula has
    sums. Reward: beta · that average (TRL logs beta · sum).
    """
    scores = _scores(pairs, against_reference=True, length_normalised=True)
    return _outcome((scores.margin - 1 / (2 * beta)).square(), beta, scores)


def hinge(pairs: Pairs, *, beta: float, length_normalised: bool = False) -> Outcome:
    """The hinge of SLiC (arXiv 2305.10425) on log-ratios, as RSO takes it (arXiv 2309.06657): max(0, 1 - m), m as for `dpo`.

    beta (RSO's gamma): the inverse of the margin of log-ratios beyond which a pair has no more to teach. Reward: beta · log-ratio.
    """
    scores = _scores(pairs, against_reference=True, length_normalised=length_normalised)
    return _outcome(F.relu(1 - beta * scores.margin), beta, scores)


def apo_zero(pairs: Pairs, *, beta: float) -> Outcome:
    """Anchored preference optimization, zero (arXiv 2408.06266): σ(-chosen reward) + σ(rejected reward).

    For answers better than the policy's own: the chosen becomes likelier, the rejected less likely, each by itself.
    beta and reward: as for `dpo`. (The paper's loss plus a constant 1, as in TRL.)
    """
    scores = _scores(pairs, against_reference=True)
    return _outcome(torch.sigmoid(-beta * scores.chosen) + torch.sigmoid(beta * scores.rejected), beta, scores)


def apo_down(pairs: Pairs, *, beta: float) -> Outcome:
    """Anchored preference optimization, down (arXiv 2408.06266): σ(chosen reward) + σ(-m), m as for `dpo`.

    For a policy better than the answers: both become less likely, the rejected more so. beta and reward: as for `dpo`.
    (The paper's loss plus a constant 1, as in TRL.)
    """
    scores = _scores(pairs, against_reference=True)
    return _outcome(torch.sigmoid(beta * scores.chosen) + torch.sigmoid(-beta * scores.margin), beta, scores)


def simpo(pairs: Pairs, *, beta: float, gamma: float) -> Outcome:
    """Simple preference optimization (arXiv 2405.14734): -log σ(chosen reward - rejected reward - gamma); no reference.

    Reward: beta · log p per token. beta: scale of the rewards (2 to 10 in the paper). gamma: margin aimed at, in units of the
    reward as in the paper; the ratio gamma / beta of the authors' configs, times beta.
    """
    scores = _scores(pairs, against_reference=False, length_normalised=True)
    return _outcome(_negative_log_sigmoid(beta * scores.margin - gamma), beta, scores)


def orpo(pairs: Pairs, *, beta: float) -> Outcome:
    """The odds-ratio term of ORPO (arXiv 2403.07691, eq. 7): -beta log σ(log odds chosen - log odds rejected); no reference.

    odds = p / (1 - p), where log p is the average over tokens. beta (the paper's lambda): weight of this term beside the
    negative log-likelihood of the chosen answer, which the caller adds. Reward, for metrics: beta · log p per token, as in TRL.
    """
    scores = _scores(pairs, against_reference=False, length_normalised=True)
    log_odds_ratio = _log_odds(scores.chosen) - _log_odds(scores.rejected)
    return _outcome(beta * _negative_log_sigmoid(log_odds_ratio), beta, scores)


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Outcome:
    """The preference term of contrastive preference optimization (arXiv 2401.08417): `dpo` with a uniform reference.

    beta: scale of the rewards, beta · log p; label_smoothing: as for `dpo`. The method's other term, the negative
    log-likelihood of the chosen answer, is added by the caller.
    """
    scores = _scores(pairs, against_reference=False)
    return _outcome(_negative_log_sigmoid(beta * scores.margin, label_smoothing), beta, scores)


def kto(
    answers: Answers, kl: Tensor, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Kahneman-Tversky optimization (arXiv 2402.01306): weight · σ(-s), s = ±beta (log-ratio - kl), + for a good answer.

    kl: scalar without gradient, how far the policy is from the reference. Its estimate is the mean over the GLOBAL batch of
    the log-ratio of mismatched answers (each prompt with the answer to another one), then at least 0: clamped after the mean.
    beta: how fast a gain or a loss saturates. Returns losses (N,) and rewards beta · log-ratio (N,), these without gradient.
    """
    log_ratios = _log_ratios(answers)
    gain = beta * (log_ratios - kl)
    losses = torch.where(
        answers.desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )
    return losses, (beta * log_ratios).detach()


def bco(answers: Answers, delta: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Binary classifier optimization (arXiv 2404.04656): -log σ(±(reward - delta)), + for a good answer.

    delta: scalar without gradient, the running mean of the rewards (so in units of beta · log-ratio) over the answers seen,
    on all ranks. The paper's is the middle of the mean rewards of good and of bad answers: equal if they are equally many.
    beta: scale of the rewards. Returns losses (N,) and rewards beta · log-ratio (N,), these without gradient.
    """
    rewards = beta * _log_ratios(answers)
    shifted = rewards - delta
    return _negative_log_sigmoid(torch.where(answers.desirable, shifted, -shifted)), rewards.detach()


class _Scores(NamedTuple):
    """log p or log-ratio of both answers, with gradient."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


def _scores(pairs: Pairs, *, against_reference: bool, length_normalised: bool = False) -> _Scores:
    """The one place that subtracts a reference and divides by lengths. An answer cut to nothing has the average 0."""
    chosen, rejected = _widened(pairs.chosen), _widened(pairs.rejected)
    if against_reference:
        if pairs.reference_chosen is None or pairs.reference_rejected is None:
            raise ValueError("this loss needs log-probabilities under a reference, and the pairs have none")
        chosen = chosen - _widened(pairs.reference_chosen)
        rejected = rejected - _widened(pairs.reference_rejected)
    if length_normalised:
        chosen = chosen / pairs.chosen_length.clamp(min=1)
        rejected = rejected / pairs.rejected_length.clamp(min=1)
    return _Scores(chosen, rejected)


def _log_ratios(answers: Answers) -> Tensor:
    if answers.reference is None:
        raise ValueError("this loss needs log-probabilities under a reference, and the answers have none")
    return _widened(answers.logps) - _widened(answers.reference)


def _widened(numbers: Tensor) -> Tensor:
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _negative_log_sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p: expm1 keeps what 1 - p would lose near 1, and near 0 the second term vanishes beside log p.

    Where each token rounds to p = 1, log p is 0 and the odds are infinite: held below that, with no gradient, as softmax has none.
    """
    logp = logp.clamp(max=-(torch.finfo(logp.dtype).eps ** 2))
    return logp - torch.log(-torch.expm1(logp))


def _outcome(losses: Tensor, beta: float, scores: _Scores) -> Outcome:
    return Outcome(losses, beta * scores.chosen.detach(), beta * scores.rejected.detach())


class Paired(NamedTuple):
    """function(pairs, *, beta, …) -> Outcome. needs_sft_term: the method adds the chosen answers' negative log-likelihood."""

    function: Callable[..., Outcome]
    needs_reference: bool
    needs_sft_term: bool = False


class Unpaired(NamedTuple):
    """function(answers, statistic, *, beta, …) -> (losses, rewards). statistic: the mean over the global batch that it takes."""

    function: Callable[..., tuple[Tensor, Tensor]]
    needs_reference: bool
    statistic: Literal["kl", "rewards"]


PAIRED: dict[str, Paired] = {
    "dpo": Paired(dpo, needs_reference=True),
    "robust": Paired(robust, needs_reference=True),
    "ipo": Paired(ipo, needs_reference=True),
    "hinge": Paired(hinge, needs_reference=True),
    "apo_zero": Paired(apo_zero, needs_reference=True),
    "apo_down": Paired(apo_down, needs_reference=True),
    "simpo": Paired(simpo, needs_reference=False),
    "orpo": Paired(orpo, needs_reference=False, needs_sft_term=True),
    "cpo": Paired(cpo, needs_reference=False, needs_sft_term=True),
}

UNPAIRED: dict[str, Unpaired] = {
    "kto": Unpaired(kto, needs_reference=True, statistic="kl"),
    "bco": Unpaired(bco, needs_reference=True, statistic="rewards"),
}
