"""Choosing the next token: filters as transformers', draws as the distribution says."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunesmith.generation.sampling import Sampling, choose, draw, keep_likely, penalize, uniforms


@pytest.fixture
def logits():
    return torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("top_k", [None, 1, 7, 50, 99])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.02, 0.5, 1.0])
def test_filters_equal_transformers(logits, top_k, top_p, min_p):
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    assert torch.equal(keep_likely(logits / 0.7, top_k, top_p, min_p), expected)


def test_ties_are_kept_as_transformers_keeps_them():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(keep_likely(logits, top_k=2), TopKLogitsWarper(2)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(logits, penalty):
    ids = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalize(logits, seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))
    sampling = Sampling(repetition_penalty=penalty)
    assert torch.equal(choose(logits, sampling, seen=seen), penalize(logits, seen, penalty).argmax(-1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, -torch.inf, 2.0, -1.0, -torch.inf]).expand(200_000, 5)
    tokens = draw(logits, uniforms(0, 0, 0, 200_000))
    assert torch.allclose(torch.bincount(tokens, minlength=5) / 200_000, logits[0].softmax(-1), atol=4e-3)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    ends = torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 3, 3]
    assert draw(logits, torch.ones(3)).tolist() == [3, 3, 3]  # float32 rounds numbers just below 1 up
    wide = torch.full((1, 150_000), -10.0)
    assert draw(wide, torch.tensor([1.0 - 2**-53], dtype=torch.float64)).item() == 149_999


def test_random_numbers_are_a_sequences_own():
    assert torch.equal(uniforms(1, 2, 3, 4), uniforms(1, 2, 3, 9)[:4])
    starts = {
        uniforms(seed, prompt, sample, 1).item() for seed in range(3) for prompt in range(3) for sample in range(3)
    }
    assert len(starts) == 27
    assert 0 <= min(starts) and max(starts) < 1


def test_low_temperature_approaches_greedy(logits):
    cold = choose(logits, Sampling(temperature=1e-4), uniforms(0, 0, 0, 4))
    assert torch.equal(cold, logits.argmax(-1))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_samples": 0}, "num_samples"),
        ({"stop": "end"}, "stop"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_senseless_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**options)
