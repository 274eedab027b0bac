"""Decoding with a cache equals the model without one, alone and in ragged batches; greedy tokens are transformers'."""

import pytest
import torch

from tests.models.conftest import pair, relative_error, tokens
from tunesmith.nn.kv_cache import KVCache

PROMPTS = (9, 4, 13)
STEPS = 8


@pytest.fixture
def model(case):
    return pair(case)[1].requires_grad_(False)


def greedy(model, prompt: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Without a cache: prompt (T,) -> (steps,)."""
    ids = prompt[None]
    for _ in range(steps):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :]


def decode(model, cache: KVCache, logits: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """With a cache, from the logits (B, V) after the prompts -> (B, steps)."""
    found = []
    for _ in range(steps):
        found.append(logits.argmax(-1, keepdim=True))
        logits = model.logits(found[-1], cache=cache)[:, -1]
    return torch.cat(found, 1)


def test_cached_logits_equal_uncached(model):
    ids = tokens(2, 30)
    cache = KVCache(model.config, 2, 30)
    pieces = [(0, 7), (7, 8), (8, 9), (9, 14), *((n, n + 1) for n in range(14, 30))]
    for start, end in pieces:
        cached = model.logits(ids[:, start:end], cache=cache)
        assert relative_error(cached, model.logits(ids[:, :end])[:, start:]) < 1e-5
    assert cache.length.tolist() == [30, 30]


@pytest.mark.parametrize("side", ["right", "left", "right, by length", "left, by position"])
def test_ragged_batch_gives_the_tokens_of_each_alone(model, side):
    prompts = [tokens(1, length, seed=length)[0] for length in PROMPTS]
    longest = max(PROMPTS)
    ids, documents = torch.zeros(3, longest, dtype=torch.int64), torch.full((3, longest), -1)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if side.startswith("right") else slice(longest - len(prompt), None)
        ids[row, where], documents[row, where] = prompt, 0
    cache = KVCache(model.config, 3, longest + STEPS)
    last = torch.tensor(PROMPTS) - 1 if side.startswith("right") else torch.full((3,), longest - 1)
    if side == "right, by length":
        if model.config.depends_on_length:
            pytest.skip("padding that isn't declared counts as length")
        logits = model.logits(ids, cache=cache)
        cache.length = torch.tensor(PROMPTS)
    elif side == "left, by position":
        positions = torch.arange(longest) - (longest - torch.tensor(PROMPTS)[:, None])
        logits = model.logits(ids, positions=positions, cache=cache)
    else:
        logits = model.logits(ids, documents=documents, cache=cache)
    assert cache.length.tolist() == list(PROMPTS)
    found = decode(model, cache, logits[torch.arange(3), last])
    for row, prompt in enumerate(prompts):
        assert found[row].tolist() == greedy(model, prompt).tolist()


def test_rows_can_be_dropped(model):
    prompts = torch.stack([tokens(1, 6, seed=row)[0] for row in range(3)])
    cache = KVCache(model.config, 3, 6 + STEPS)
    logits = model.logits(prompts, cache=cache)[:, -1]
    keep = torch.tensor([2, 0])
    cache.select(keep)
    found = decode(model, cache, logits[keep])
    assert [row.tolist() for row in found] == [greedy(model, prompts[row]).tolist() for row in keep]


def test_greedy_tokens_are_those_of_transformers(case):
    reference, model = pair(case)
    ids = tokens(1, 12)
    # With a cache, transformers would keep keys that were rotated by the frequencies of shorter sequences.
    options = dict(use_cache=False) if "dynamic" in case else {}
    theirs = reference.generate(
        ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    cache = KVCache(model.config, 1, 12 + STEPS)
    with torch.no_grad():
        ours = decode(model, cache, model.logits(ids, cache=cache)[:, -1])
    assert ours[0].tolist() == theirs[0, 12:].tolist()


def test_a_full_cache_is_refused():
    model = pair("llama")[1]
    cache = KVCache(model.config, 1, 4)
    model.logits(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="a cache of 4 tokens can't take 1 after 4"):
        model.logits(tokens(1, 1), cache=cache)
