"""Losses of a text by its parts: no token is lost, and none depends on how the parts or the windows are cut."""

import pytest

from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.eval.perplexity import perplexity
from tunesmith.eval.texts import score_file
from tunesmith.training.load import load_model


@pytest.fixture(scope="module")
def models(tiny_model):
    return load_model(tiny_model), load_tokenizer(tiny_model)


TEXTS = [
    "\n".join(f"the quick brown fox {'jumps ' * (line % 7)}over {line} lazy dögs" for line in range(90)),
    "one line without an end " * 150,
    "",
    "short",
]


@pytest.mark.parametrize("max_length, stride", [(512, None), (128, None), (128, 32)])
def test_parts_add_up_to_the_whole(models, max_length, stride):
    found = score_file(*models, "file", TEXTS, max_length, stride)
    whole = perplexity(*models, TEXTS, max_length, stride)
    assert found.nll == pytest.approx(whole.nll, rel=1e-6) and found.tokens == whole.tokens
    assert found.bytes == whole.bytes == sum(block.bytes for block in found.blocks)
    assert sum(block.nll for block in found.blocks) == pytest.approx(found.nll)
    assert found.words == sum(len(text.split()) for text in TEXTS)
    assert max(block.bytes for block in found.blocks) < 2100 and len(found.blocks) > 5


def test_a_block_holds_the_tokens_that_begin_in_it(models):
    text = TEXTS[0]
    first = score_file(*models, "file", [text], 512).blocks
    longer = score_file(*models, "file", [text + " more " * 300], 512).blocks
    assert [block.nll for block in longer[: len(first) - 1]] == pytest.approx(
        [block.nll for block in first[:-1]], rel=1e-5
    )
