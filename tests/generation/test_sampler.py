"""Many sequences, each with its own options: the same tokens as alone, and what transformers' filters leave."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunesmith.errors import UserError
from tunesmith.generation.sampler import IN_PROMPT, Sampler, draw, seen_in
from tunesmith.generation.sampling import Sampling, uniforms

CPU = torch.device("cpu")
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.3, "top_k": 99_999},
    {"temperature": 0.8, "top_p": 1e-6},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.98},
    {"temperature": 0.8, "top_p": 1.0},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 0.9, "min_p": 1.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.9, "top_p": 0.95, "min_p": 0.001},
    {"temperature": 0.9, "top_k": 600, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 20, "min_p": 0.3, "repetition_penalty": 1.3},
]


def logits_of(rows, size=5000, seed=0, scale=3.0, rounded=False):
    """Some rows are peaked, some flat; rounded ones have many equal values."""
    values = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale
    values = values * torch.linspace(0.2, 2, rows)[:, None]
    return values.bfloat16().float() if rounded else values


class StableTopP:
    """transformers' top-p, which leaves open which of equal logits go first: those of lower ids."""

    def __init__(self, top_p):
        self.top_p = top_p

    def __call__(self, ids, logits):
        ascending, order = logits.sort(dim=-1, stable=True)
        is_tail = ascending.double().softmax(-1).cumsum(-1) <= 1 - self.top_p
        is_tail[:, -1] = False
        return logits.masked_fill(is_tail.scatter(-1, order, is_tail), -torch.inf)


def filtered(logits, options, ids=None, top_p=TopPLogitsWarper):
    """(1, V) as transformers leaves them."""
    if "repetition_penalty" in options:
        logits = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(ids, logits)
    logits = TemperatureLogitsWarper(options["temperature"])(None, logits)
    if "top_k" in options:
        logits = TopKLogitsWarper(options["top_k"])(None, logits)
    if options.get("top_p", 1) < 1:
        logits = top_p(options["top_p"])(None, logits)
    return MinPLogitsWarper(options["min_p"])(None, logits) if "min_p" in options else logits


def drawn_from(logits, number):
    """Inverting the distribution function of softmax(logits) (1, V) in the order of the ids."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return int(torch.searchsorted(cumulative, number[:, None] * cumulative[:, -1:], right=True))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_draws_are_from_what_transformers_leaves(options, rounded):
    """Also where so many tokens are kept that not all are among the first candidates, and where the last ones are equal."""
    logits = logits_of(24, rounded=rounded)
    numbers, ids = uniforms(0, 0, 0, 24), torch.arange(24 * 5).view(24, 5) * 7
    seen = torch.stack([seen_in(row.tolist(), 5000) for row in ids])
    sampler = Sampler([Sampling(**options)] * 24, CPU)
    tokens = sampler.choose(logits, numbers, seen)
    for row, token in enumerate(tokens.tolist()):
        part = slice(row, row + 1)
        left = filtered(logits[part], options, ids[part], StableTopP if rounded else TopPLogitsWarper)
        assert token == drawn_from(left, numbers[part])


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_exactly_the_kept_tokens_come(options):
    """Numbers close to each other reach every token that is kept, and no other."""
    logits, ids = logits_of(3, 60, rounded=True)[1:2], torch.tensor([[3, 4]])
    kept = filtered(logits, options, ids, StableTopP).softmax(-1).squeeze(0)
    numbers = torch.arange(20_000, dtype=torch.float64) / 20_000
    sampler = Sampler([Sampling(**options)] * 20_000, CPU)
    seen = seen_in(ids[0].tolist(), 60).expand(20_000, 60)
    shares = torch.bincount(sampler.choose(logits.expand(20_000, 60), numbers, seen), minlength=60) / 20_000
    assert (shares[kept == 0] == 0).all()
    assert torch.allclose(shares, kept, atol=1.1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_the_others(threads):
    samplings = [Sampling(**options) for options in OPTIONS]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(4):
            logits, numbers = logits_of(len(samplings), 40_961, seed, rounded=seed > 1), uniforms(seed, 0, 0, 16)
            seen = torch.stack([seen_in([row, 3, 4], 40_961) for row in range(len(samplings))])
            together = Sampler(samplings, CPU).choose(logits, numbers, seen)
            for row, one in enumerate(samplings):
                part = slice(row, row + 1)
                alone = Sampler([one], CPU).choose(logits[part], numbers[part], seen[part])
                assert torch.equal(alone, together[part]), one
            order = torch.randperm(len(samplings), generator=torch.Generator().manual_seed(seed))
            mixed = Sampler([samplings[row] for row in order], CPU).choose(logits[order], numbers[order], seen[order])
            assert torch.equal(mixed, together[order])
    finally:
        torch.set_num_threads(before)


def test_greedy_takes_the_likeliest():
    logits = logits_of(5)
    sampler = Sampler([Sampling()] * 5, CPU)
    assert not sampler.needs_uniforms and not sampler.needs_seen
    assert torch.equal(sampler.choose(logits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-39, 1e-300])
def test_low_temperatures_approach_it(temperature):
    logits = logits_of(5)
    samplings = [
        Sampling(temperature=temperature, **more) for more in ({}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5}, {})
    ]
    assert torch.equal(Sampler(samplings, CPU).choose(logits, uniforms(0, 0, 0, 5)), logits.argmax(-1))


def test_the_given_logits_stay_as_they_are():
    logits = logits_of(2)
    copy, seen = logits.clone(), torch.stack([seen_in([1, 2], 5000)] * 2)
    sampling = Sampling(temperature=0.5, repetition_penalty=2.0, logit_bias={3: 4.0}, top_p=0.5)
    Sampler([sampling] * 2, CPU).choose(logits, uniforms(0, 0, 0, 2), seen, torch.ones(2, 5000, dtype=torch.bool))
    assert torch.equal(logits, copy)


def test_presence_and_frequency_count_what_was_generated():
    """OpenAI's formula; the prompt's tokens count for the repetition penalty alone."""
    logits = torch.tensor([[2.0, 1.9, 1.0, 0.5]]).expand(5, 4)
    seen = torch.stack([seen_in([0], 4)] * 5)
    assert seen[0].tolist() == [IN_PROMPT, 0, 0, 0]
    samplings = [
        Sampling(presence_penalty=0.2),
        Sampling(frequency_penalty=0.4),
        Sampling(repetition_penalty=1.1),
        Sampling(presence_penalty=-3.0),
        Sampling(),
    ]
    sampler = Sampler(samplings, CPU)
    assert sampler.needs_seen
    assert sampler.choose(logits, seen=seen).tolist() == [0, 0, 1, 0, 0]
    seen[:, 0] += 1
    assert sampler.choose(logits, seen=seen).tolist() == [1, 1, 1, 0, 0]
    seen[:, 1] += 2
    assert sampler.choose(logits, seen=seen).tolist() == [0, 0, 0, 0, 0]  # 1.8 1.7, 1.6 1.1, 1.82 1.73, 5 4.9, 2 1.9
    seen[:, 0] += 4
    assert sampler.choose(logits, seen=seen).tolist() == [0, 1, 0, 0, 0]


def test_bias_moves_tokens_of_its_own_row():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(3, 3)
    samplings = [Sampling(logit_bias={2: 2.5}), Sampling(logit_bias={0: -100, 1: -100}), Sampling()]
    assert Sampler(samplings, CPU).choose(logits).tolist() == [2, 2, 0]
    with pytest.raises(UserError, match="`logit_bias` names token 3, but the model's vocabulary ends at 2"):
        Sampler([Sampling(logit_bias={3: 1.0})], CPU).choose(logits[:1])


def test_only_allowed_tokens_come():
    logits = logits_of(len(OPTIONS), 300)
    allowed = torch.zeros(len(OPTIONS), 300, dtype=torch.bool)
    allowed[:, 40:43] = True
    allowed[1] = True
    sampler = Sampler([Sampling(**options) for options in OPTIONS], CPU)
    seen = torch.zeros(len(OPTIONS), 300, dtype=torch.int32)
    free = sampler.choose(logits, uniforms(0, 0, 0, 16), seen)
    tokens = sampler.choose(logits, uniforms(0, 0, 0, 16), seen, allowed)
    assert set(tokens[allowed.sum(-1) == 3].tolist()) <= {40, 41, 42}
    assert tokens[1] == free[1]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, -torch.inf, 2.0, -1.0, -torch.inf]).expand(100_000, 5)
    tokens = draw(logits.softmax(-1), uniforms(0, 0, 0, 100_000))
    assert torch.allclose(torch.bincount(tokens, minlength=5) / 100_000, logits[0].softmax(-1), atol=4e-3)


@pytest.mark.parametrize("size", [5, 256, 511, 512, 513, 150_000])
def test_impossible_tokens_are_never_drawn(size):
    ends = torch.tensor([0.0, 0.5, 1.0 - 2**-53, 1.0], dtype=torch.float64)  # float32 rounds numbers just below 1 up
    for possible in ([0, size - 1], [1], [size - 1], [size // 2, size // 2 + 1]):
        logits = torch.full((4, size), -torch.inf)
        logits[:, possible] = 0.0
        first, last = possible[0], possible[-1]
        expected = [first, last, last, last]
        assert draw(logits.softmax(-1), ends).tolist() == expected
        sampler = Sampler([Sampling(temperature=1.0, min_p=0.5)] * 4, CPU)
        assert sampler.choose(logits, ends).tolist() == expected
    assert draw(torch.full((1, size), 1 / size), ends[2:3]).item() == size - 1
