"""Preference losses by hand, and what must hold of each. test_preference_trl.py compares them with TRL's."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from math import exp, log

import pytest
import torch

from tunesmith.losses.preference import PAIRED, UNPAIRED, Answers, Outcome, Pairs, bco, kto, orpo

OWN_NUMBERS = {"robust": {"label_smoothing": 0.2}, "simpo": {"gamma": 0.5}}


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def nll(x: float) -> float:
    return -log(sigmoid(x))


def log_odds(p: float) -> float:
    return log(p / (1 - p))


def two_pairs(dtype=torch.float32) -> Pairs:
    """Log-ratios 2, -1 (by token 0.5, -0.2) and -3, 3 (by token -0.5, 1); log p by token -3, -4 and -5, -3."""
    rows = [-12.0, -30.0], [-20.0, -9.0], [4, 6], [5, 3], [-14.0, -27.0], [-19.0, -12.0]
    chosen, rejected, chosen_length, rejected_length, reference_chosen, reference_rejected = map(torch.tensor, rows)
    return Pairs(
        chosen.to(dtype).requires_grad_(),
        rejected.to(dtype).requires_grad_(),
        chosen_length,
        rejected_length,
        reference_chosen.to(dtype),
        reference_rejected.to(dtype),
    )


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(
        pairs.rejected,
        pairs.chosen,
        pairs.rejected_length,
        pairs.chosen_length,
        pairs.reference_rejected,
        pairs.reference_chosen,
    )


def run(name: str, pairs: Pairs, **numbers) -> Outcome:
    return PAIRED[name].function(pairs, **{"beta": 0.1} | OWN_NUMBERS.get(name, {}) | numbers)


def gradients(losses: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(losses.sum(), [pairs.chosen, pairs.rejected], retain_graph=True)


BY_HAND = [  # name, its numbers, losses, rewards of the chosen and of the rejected
    ("dpo", {"beta": 0.1}, [nll(0.3), nll(-0.6)], [0.2, -0.3], [-0.1, 0.3]),
    (
        "dpo",
        {"beta": 0.1, "label_smoothing": 0.2},
        [0.8 * nll(0.3) + 0.2 * nll(-0.3), 0.8 * nll(-0.6) + 0.2 * nll(0.6)],
        [0.2, -0.3],
        [-0.1, 0.3],
    ),
    ("dpo", {"beta": 2, "length_normalised": True}, [nll(1.4), nll(-3.0)], [1.0, -1.0], [-0.4, 2.0]),
    (
        "robust",
        {"beta": 0.1, "label_smoothing": 0.2},
        [(0.8 * nll(0.3) - 0.2 * nll(-0.3)) / 0.6, (0.8 * nll(-0.6) - 0.2 * nll(0.6)) / 0.6],
        [0.2, -0.3],
        [-0.1, 0.3],
    ),
    (
        "robust",
        {"beta": 2, "label_smoothing": 0.1, "length_normalised": True},
        [(0.9 * nll(1.4) - 0.1 * nll(-1.4)) / 0.8, (0.9 * nll(-3.0) - 0.1 * nll(3.0)) / 0.8],
        [1.0, -1.0],
        [-0.4, 2.0],
    ),
    ("ipo", {"beta": 0.5}, [(0.7 - 1) ** 2, (-1.5 - 1) ** 2], [0.25, -0.25], [-0.1, 0.5]),
    ("hinge", {"beta": 0.1}, [1 - 0.3, 1 + 0.6], [0.2, -0.3], [-0.1, 0.3]),
    ("hinge", {"beta": 0.5}, [0, 1 + 3.0], [1.0, -1.5], [-0.5, 1.5]),
    ("hinge", {"beta": 1, "length_normalised": True}, [1 - 0.7, 1 + 1.5], [0.5, -0.5], [-0.2, 1.0]),
    (
        "apo_zero",
        {"beta": 0.1},
        [1 - sigmoid(0.2) + sigmoid(-0.1), 1 - sigmoid(-0.3) + sigmoid(0.3)],
        [0.2, -0.3],
        [-0.1, 0.3],
    ),
    (
        "apo_down",
        {"beta": 0.1},
        [sigmoid(0.2) + 1 - sigmoid(0.3), sigmoid(-0.3) + 1 - sigmoid(-0.6)],
        [0.2, -0.3],
        [-0.1, 0.3],
    ),
    ("simpo", {"beta": 2, "gamma": 0.5}, [nll(2 - 0.5), nll(-4 - 0.5)], [-6, -10], [-8, -6]),
    (
        "orpo",
        {"beta": 0.1},
        [
            0.1 * nll(log_odds(exp(-3)) - log_odds(exp(-4))),
            0.1 * nll(log_odds(exp(-5)) - log_odds(exp(-3))),
        ],
        [-0.3, -0.5],
        [-0.4, -0.3],
    ),
    ("cpo", {"beta": 0.1}, [nll(0.8), nll(-2.1)], [-1.2, -3.0], [-2.0, -0.9]),
    (
        "cpo",
        {"beta": 0.1, "label_smoothing": 0.2},
        [0.8 * nll(0.8) + 0.2 * nll(-0.8), 0.8 * nll(-2.1) + 0.2 * nll(2.1)],
        [-1.2, -3.0],
        [-2.0, -0.9],
    ),
]


@pytest.mark.parametrize("name, numbers, losses, chosen_rewards, rejected_rewards", BY_HAND)
def test_by_hand(name, numbers, losses, chosen_rewards, rejected_rewards):
    outcome = PAIRED[name].function(two_pairs(), **numbers)
    assert outcome.losses.tolist() == pytest.approx(losses, rel=1e-6, abs=1e-7)
    assert outcome.chosen_rewards.tolist() == pytest.approx(chosen_rewards, rel=1e-6)
    assert outcome.rejected_rewards.tolist() == pytest.approx(rejected_rewards, rel=1e-6)
    assert outcome.losses.requires_grad and not outcome.chosen_rewards.requires_grad
    assert not outcome.rejected_rewards.requires_grad


def four_answers(dtype=torch.float32) -> Answers:
    """Log-ratios 2, -3, -1, 4; the first two are good."""
    logps, reference = torch.tensor([-12.0, -30.0, -20.0, -9.0]), torch.tensor([-14.0, -27.0, -19.0, -13.0])
    desirable = torch.tensor([True, True, False, False])
    return Answers(logps.to(dtype).requires_grad_(), torch.tensor([4, 6, 5, 3]), desirable, reference.to(dtype))


def test_kto_by_hand():
    numbers = {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    losses, rewards = kto(four_answers(), torch.tensor(0.5), **numbers)
    expected = [
        1.5 * (1 - sigmoid(0.15)),
        1.5 * (1 - sigmoid(-0.35)),
        0.5 * (1 - sigmoid(0.15)),
        0.5 * (1 - sigmoid(-0.35)),
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert rewards.tolist() == pytest.approx([0.2, -0.3, -0.1, 0.4], rel=1e-6)
    assert losses.requires_grad and not rewards.requires_grad


def test_bco_by_hand():
    losses, rewards = bco(four_answers(), torch.tensor(0.05), beta=0.1)
    assert losses.tolist() == pytest.approx([nll(0.15), nll(-0.35), nll(0.15), nll(-0.35)], rel=1e-6)
    assert rewards.tolist() == pytest.approx([0.2, -0.3, -0.1, 0.4], rel=1e-6)
    assert losses.requires_grad and not rewards.requires_grad


@pytest.mark.parametrize("name", PAIRED)
def test_chosen_becomes_likelier_and_rejected_less_likely(name):
    pairs = two_pairs()
    chosen, rejected = gradients(run(name, pairs).losses, pairs)
    assert (rejected > 0).all()
    assert (chosen > 0).all() if name == "apo_down" else (chosen < 0).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_good_answers_become_likelier_and_bad_less_likely(name):
    answers = four_answers()
    losses, _ = UNPAIRED[name].function(answers, torch.tensor(0.3), beta=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), answers.logps)
    assert (gradient[:2] < 0).all() and (gradient[2:] > 0).all()


@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "hinge", "cpo"])
def test_what_one_answer_gains_the_other_loses(name):
    pairs = replace(two_pairs(), rejected_length=two_pairs().chosen_length)
    chosen, rejected = gradients(run(name, pairs).losses, pairs)
    assert torch.equal(chosen, -rejected)


def test_where_nothing_was_learnt_yet():
    """The policy is the reference, or both answers are equally likely by token."""
    pairs = two_pairs()
    start = replace(pairs, reference_chosen=pairs.chosen.detach(), reference_rejected=pairs.rejected.detach())
    same = replace(pairs, rejected=pairs.chosen, rejected_length=pairs.chosen_length)
    expected = {"dpo": log(2), "robust": log(2), "ipo": 1 / (4 * 0.1**2), "hinge": 1, "apo_zero": 1, "apo_down": 1}
    for name, loss in expected.items():
        assert run(name, start).losses.tolist() == pytest.approx([loss] * 2, rel=1e-6), name
    for name, loss in {"cpo": log(2), "simpo": nll(-0.5), "orpo": 0.1 * log(2)}.items():
        assert run(name, same).losses.tolist() == pytest.approx([loss] * 2, rel=1e-6), name


def test_labels_the_wrong_way_round():
    pairs = two_pairs(torch.float64)
    flipped = swapped(pairs)
    clean = run("dpo", pairs).losses
    assert torch.allclose(
        run("dpo", pairs, label_smoothing=0.3).losses, run("dpo", flipped, label_smoothing=0.7).losses, rtol=1e-12
    )
    noisy = 0.8 * run("robust", pairs).losses + 0.2 * run("robust", flipped).losses
    assert torch.allclose(
        noisy, clean, rtol=1e-12
    )  # unbiased: a fifth of the labels flipped, and the mean is DPO's loss
    anchored = run("apo_zero", pairs).losses + run("apo_zero", flipped).losses
    assert torch.allclose(anchored, torch.full_like(anchored, 2.0), rtol=1e-12)
    for name in ("dpo", "robust", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo", "cpo"):
        a, b = run(name, pairs), run(name, flipped)
        assert torch.equal(a.chosen_rewards, b.rejected_rewards), name


def test_two_binary_classifications_bound_dpo():
    """The theorem that BCO rests on, for any delta (arXiv 2404.04656)."""
    pairs = two_pairs()
    answers = Answers(
        torch.cat([pairs.chosen, pairs.rejected]),
        torch.cat([pairs.chosen_length, pairs.rejected_length]),
        torch.tensor([True, True, False, False]),
        torch.cat([pairs.reference_chosen, pairs.reference_rejected]),
    )
    for delta in (-1.0, 0.0, 0.3):
        good, bad = bco(answers, torch.tensor(delta), beta=0.1)[0].chunk(2)
        assert (good + bad > run("dpo", pairs).losses).all()


@pytest.mark.parametrize("name", ["dpo", "robust", "hinge"])
def test_length_normalisation_is_division_before_anything_else(name):
    pairs = two_pairs(torch.float64)
    a, b = pairs.chosen_length, pairs.rejected_length
    divided = Pairs(
        pairs.chosen / a, pairs.rejected / b, a, b, pairs.reference_chosen / a, pairs.reference_rejected / b
    )
    for one, other in zip(run(name, pairs, length_normalised=True), run(name, divided)):
        assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("average", [-1e-9, -1e-7, -1e-5, -1e-3, -0.1, -math.log(2), -2.0, -30.0, -300.0])
def test_odds_are_exact_where_p_is_near_one_or_zero(average):
    """Against 50 digits, in float32: the odds of a single answer beside one of even odds, and their gradient."""
    logp = torch.tensor([average * 8]).requires_grad_()
    even, eight = torch.tensor([-math.log(2) * 8]), torch.tensor([8])
    with localcontext(prec=50):
        p = (Decimal(logp.item()) / 8).exp()
        q = (Decimal(even.item()) / 8).exp()
        log_odds_ratio = (p / (1 - p)).ln() - (q / (1 - q)).ln()
        expected = float((1 + (-log_odds_ratio).exp()).ln())
        slope = float(-1 / (1 + log_odds_ratio.exp()) / (1 - p) / 8)
    (loss,) = orpo(Pairs(logp, even, eight, eight), beta=1.0).losses
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(slope, rel=2e-6)


EXTREMES = [0.0, -1e-30, -1e-8, -1.0, -1e3, -1e6]


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("beta", [0.01, 10.0])
def test_extremes_are_finite(name, beta):
    grid = torch.cartesian_prod(*[torch.tensor(EXTREMES)] * 4).T
    lengths = torch.arange(grid.shape[1]) % 3  # an answer may have been cut to nothing
    pairs = Pairs(
        grid[0].clone().requires_grad_(), grid[1].clone().requires_grad_(), lengths, lengths, grid[2], grid[3]
    )
    outcome = run(name, pairs, beta=beta)
    for tensor in (*outcome, *gradients(outcome.losses, pairs)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("statistic", [0.0, 1e5])
def test_extremes_are_finite_unpaired(name, statistic):
    grid = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES), torch.tensor([0.0, 1.0])).T
    answers = Answers(grid[0].clone().requires_grad_(), torch.ones(grid.shape[1]), grid[2].bool(), grid[1])
    losses, rewards = UNPAIRED[name].function(answers, torch.tensor(statistic), beta=10.0)
    (gradient,) = torch.autograd.grad(losses.sum(), answers.logps)
    assert losses.isfinite().all() and rewards.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_half_precision_is_widened_first(name):
    half = two_pairs(torch.bfloat16)
    for one, other in zip(run(name, half), run(name, two_pairs())):  # these numbers are exact in bfloat16
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("name", PAIRED)
def test_a_reference_is_asked_for_or_without_effect(name):
    pairs = two_pairs()
    alone = replace(pairs, reference_chosen=None, reference_rejected=None)
    if PAIRED[name].needs_reference:
        with pytest.raises(ValueError, match="reference"):
            run(name, alone)
    else:
        assert torch.equal(run(name, pairs).losses, run(name, alone).losses)


@pytest.mark.parametrize("name", UNPAIRED)
def test_a_reference_is_asked_for_unpaired(name):
    assert UNPAIRED[name].needs_reference
    with pytest.raises(ValueError, match="reference"):
        UNPAIRED[name].function(replace(four_answers(), reference=None), torch.tensor(0.0), beta=0.1)


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.7])
def test_robust_needs_labels_that_are_mostly_right(share):
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 0.5"):
        run("robust", two_pairs(), label_smoothing=share)


def test_no_pairs_give_a_gradient_of_nothing():
    """A rank or a micro-batch may hold none."""
    for name in PAIRED:
        empty = torch.empty(0)
        pairs = Pairs(empty.clone().requires_grad_(), empty.clone().requires_grad_(), empty, empty, empty, empty)
        losses = run(name, pairs).losses
        assert losses.shape == (0,) and gradients(losses, pairs)[0].shape == (0,)


def test_a_name_is_its_function():
    for name, loss in {**PAIRED, **UNPAIRED}.items():
        assert loss.function.__name__ == name
