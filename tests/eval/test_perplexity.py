"""Perplexity against the definition, token by token through transformers."""

import math

import pytest
import torch

from tests.models.conftest import pair
from tunesmith.errors import UserError
from tunesmith.eval.perplexity import Perplexity, perplexity


class Letters:
    """A tokenizer of letters with a token before each text."""

    def encode(self, text):
        return [1, *(ord(letter) - 32 for letter in text)]


TEXTS = ["the quick brown fox jumps over the lazy dog", "", "a", "some more: and another one, longer than a window"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "llama dynamic", "qwen2 tied windows"])
def models(request):
    return pair(request.param)


def by_hand(reference, texts, max_length, stride):
    """Every window through transformers alone; (nll, tokens)."""
    nll, tokens = 0.0, 0
    for text in texts:
        ids, done = Letters().encode(text), 1
        for start in range(0, len(ids), stride):
            window = torch.tensor([ids[start : start + max_length + 1]])
            first = done - start - 1
            if window.shape[1] - 1 > first:
                log_probs = reference(window[:, :-1]).logits.log_softmax(-1)[0]
                nll -= log_probs.gather(-1, window[0, 1:, None])[first:].sum().item()
                tokens += window.shape[1] - 1 - first
            done = max(done, start + window.shape[1])
    return nll, tokens


@pytest.mark.parametrize("max_length, stride", [(60, None), (16, None), (16, 5), (16, 1), (1, 1)])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_each_token_is_scored_once_as_transformers_does(models, max_length, stride, batch_tokens):
    reference, model = models
    found = perplexity(model, Letters(), iter(TEXTS), max_length, stride, batch_tokens)
    with torch.no_grad():
        nll, tokens = by_hand(reference.eval(), TEXTS, max_length, stride or max_length)
    assert found.tokens == tokens == sum(map(len, TEXTS)) and found.bytes == sum(map(len, TEXTS))
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / found.bytes, rel=1e-5)


def test_more_than_a_float_holds():
    assert Perplexity(1e6, 10, 10).perplexity == math.inf


@pytest.mark.parametrize(
    "texts, max_length, stride, message",
    [
        ([], 8, None, "nothing to score"),
        ([""], 8, None, "nothing to score"),
        (["abc"], 999, None, "windows of 999 tokens; the model's context allows 1 to"),
        (["abc"], 0, None, "windows of 0 tokens"),
        (["abc"], 8, 9, "a stride of 9 tokens"),
        (["abc"], 8, 0, "a stride of 0 tokens"),
    ],
)
def test_mistakes_are_told(models, texts, max_length, stride, message):
    with pytest.raises(UserError, match=message):
        perplexity(models[1], Letters(), texts, max_length, stride)
