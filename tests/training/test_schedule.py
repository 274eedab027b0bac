"""The learning rate over a run."""

import math

import pytest

from tunesmith.configs.schedule import Constant, Cosine, Linear, WarmupStableDecay
from tunesmith.training.schedule import lr_factor


def curve(schedule, total=100):
    return [lr_factor(schedule, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("kind", [Constant, Cosine, Linear, WarmupStableDecay])
def test_warmup_rises_in_equal_steps_to_the_peak(kind):
    factors = curve(kind(num_warmup_steps=10))
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(factors) == factors[10] == 1.0
    assert all(factor > 0 for factor in factors)


@pytest.mark.parametrize("kind", [Cosine, Linear, WarmupStableDecay])
def test_a_decay_falls_to_its_floor(kind):
    factors = curve(kind(min_lr_ratio=0.1), total=1000)
    assert all(a >= b for a, b in zip(factors, factors[1:]))
    assert factors[-1] == pytest.approx(0.1, abs=0.02)


def test_ratio_and_steps_are_the_same_thing():
    assert curve(Cosine(warmup_ratio=0.2)) == curve(Cosine(num_warmup_steps=20))


def test_wsd_is_constant_until_its_last_share():
    factors = curve(WarmupStableDecay(num_warmup_steps=5, decay_ratio=0.2))
    assert set(factors[5:81]) == {1.0} and factors[81] < 1.0


def test_constant_stays():
    assert set(curve(Constant())) == {1.0}


def torchtitan(step, total, warmup, decay_ratio, kind, lr_min):
    """Its linear_warmup_stable_decay (components/lr_scheduler.py, July 2025) at a step counted from 0."""
    decay = round(total * decay_ratio) if decay_ratio is not None else total - warmup
    stable = total + 1 - warmup - decay
    if step < warmup:
        return (step + 1) / warmup
    if step < warmup + stable:
        return 1.0
    progress = (step + 1 - warmup - stable) / decay
    fall = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return lr_min + (1 - lr_min) * fall[kind]


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize(("total", "warmup", "ratio"), [(100, 10, 0.2), (97, 5, 0.33), (50, 0, 0.5), (40, 8, 1.0)])
@pytest.mark.parametrize("lr_min", [0.0, 0.1])
def test_wsd_is_torchtitans(kind, total, warmup, ratio, lr_min):
    ours = WarmupStableDecay(num_warmup_steps=warmup, decay_ratio=ratio, decay_type=kind, min_lr_ratio=lr_min)
    ratio = min(ratio, (total - warmup) / total)  # it clamps a decay that would reach into the warm-up
    theirs = [torchtitan(step, total, warmup, ratio, kind, lr_min) for step in range(total)]
    assert curve(ours, total) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("kind", "ours"), [("linear", Linear), ("cosine", Cosine)])
def test_a_decay_without_a_stable_stretch_is_torchtitans_default(kind, ours):
    theirs = [torchtitan(step, 60, 12, None, kind, 0.05) for step in range(60)]
    assert curve(ours(num_warmup_steps=12, min_lr_ratio=0.05), 60) == pytest.approx(theirs, abs=1e-12)
