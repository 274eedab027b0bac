"""Sampling's options, and a sequence's own random numbers."""

import math

import pytest
import torch

from tunesmith.generation.constraints import Constraint
from tunesmith.generation.sampling import RandomNumbers, Sampling, uniforms


def test_random_numbers_are_a_sequences_own():
    assert torch.equal(uniforms(1, 2, 3, 4), uniforms(1, 2, 3, 9)[:4])
    starts = {
        uniforms(seed, prompt, sample, 1).item() for seed in range(3) for prompt in range(3) for sample in range(3)
    }
    assert len(starts) == 27
    assert 0 <= min(starts) and max(starts) < 1
    numbers = RandomNumbers(1, 2, 3)
    assert [numbers[500], numbers[0], numbers[64]] == uniforms(1, 2, 3, 501)[[500, 0, 64]].tolist()
    whole = torch.Generator().manual_seed(numbers._generator.initial_seed())
    assert torch.equal(uniforms(1, 2, 3, 200), torch.rand(200, generator=whole, dtype=torch.float64))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias.*-1: 1.0"),
        ({"logit_bias": {5: math.nan}}, "logit_bias.*5: nan"),
        ({"num_samples": 0}, "num_samples"),
        ({"stop": "end"}, "stop"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)


def test_it_is_a_value():
    """The engine tells by it which sequences are sampled alike."""
    one, two = (Sampling(logit_bias={3: 1.0}, constraint=Constraint.regex("a+")) for _ in range(2))
    assert one == two and len({one, two}) == 1
    assert one != Sampling(logit_bias={3: 1.0}, constraint=Constraint.regex("b+"))
