"""The learning rate over a run."""

import pytest

from tunesmith.configs.shared import Constant, Cosine, Linear, WarmupStableDecay
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
