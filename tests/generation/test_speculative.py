"""Guessing ahead changes the number of passes, never the text."""

import copy
import dataclasses

import pytest

from tests.generation.test_engine import Letters, prompts_of
from tests.models.conftest import pair
from tunesmith.errors import UserError
from tunesmith.generation.engine import Engine
from tunesmith.generation.reader import generating
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speculative import DraftModel, PromptLookup
from tunesmith.generation.writing import Writing, random_numbers
from tunesmith.training.preflight import check_draft


def written(model, prompts, sampling, drafter=None, batch_size=3, cache_tokens=2000):
    """(ids, log-probabilities) of each, and how many passes it took."""
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    engine = Engine(model, Letters(), batch_size, cache_tokens, drafter=drafter)
    hook = model.model.register_forward_hook(count)
    writings = [
        Writing(ids, sampling, index, random_numbers(sampling, 3, index, 0)) for index, ids in enumerate(prompts)
    ]
    with generating(model):
        for one in writings:
            engine.add(one)
        while engine.is_busy:
            engine.step()
    hook.remove()
    assert engine.reader.blocks.available == engine.reader.pool.num_blocks
    return [(one.ids, one.log_probs) for one in writings], passes


SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=30, log_probs=True),
    "sampled": Sampling(max_new_tokens=30, temperature=0.7, top_p=0.9, log_probs=True),
    "penalized": Sampling(max_new_tokens=30, temperature=0.5, repetition_penalty=1.2, log_probs=True),
    "stopped": Sampling(max_new_tokens=30, stop=("A", "b"), log_probs=True),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("case", ["llama", "gemma2", "mistral"])
def test_the_text_is_the_same(name, case):
    model = pair(case)[1]
    prompts = [ids * 2 for ids in prompts_of(4, 9, 5, 12)]
    expected, passes = written(model, prompts, SAMPLINGS[name])
    drafters = {
        "lookup": PromptLookup(5, 2),
        "itself": DraftModel(model, 2000, 3),  # whose passes are counted, too
        "other": DraftModel(pair("llama")[1], 2000, 3),
    }
    for kind, drafter in drafters.items():
        found, fewer = written(model, prompts, SAMPLINGS[name], drafter)
        for (ids, log_probs), (mine, own) in zip(expected, found):
            assert mine == ids and own == pytest.approx(log_probs, abs=1e-4), kind
        if kind != "itself":
            assert fewer <= passes
        if isinstance(drafter, DraftModel):
            assert drafter.reader.blocks.available == drafter.reader.pool.num_blocks and not drafter._memories


def test_right_guesses_save_passes():
    model = pair("llama")[1]
    draft = copy.deepcopy(model)
    prompts = prompts_of(6, 3)
    _, passes = written(model, prompts, SAMPLINGS["greedy"])
    _, fewer = written(model, prompts, SAMPLINGS["greedy"], DraftModel(draft, 2000, 4))
    assert passes >= 30 and fewer <= 8


def test_lookup_finds_the_latest_longest_match():
    lookup = PromptLookup(3, 2)
    assert lookup._continuation([1, 2, 3, 4, 1, 2, 5, 6, 7, 1, 2], 3) == [5, 6, 7]
    assert lookup._continuation([9, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert lookup._continuation([9, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert lookup._continuation([1, 2, 3], 3) == [] and lookup._continuation([1, 1], 0) == []


def test_little_memory_puts_sequences_off_but_changes_nothing():
    model = pair("llama")[1]
    prompts = prompts_of(20, 9, 30, 12)
    expected, _ = written(model, prompts, SAMPLINGS["sampled"])
    for drafter in (None, PromptLookup(), DraftModel(model, 160, 3)):
        found, _ = written(model, prompts, SAMPLINGS["sampled"], drafter, 4, 96)
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]


def test_drafts_that_do_not_fit_are_refused():
    llama, dynamic = pair("llama")[1].config, pair("llama dynamic beyond")[1].config
    check_draft(llama, llama)
    with pytest.raises(UserError, match="depend on a text's length"):
        check_draft(dynamic, llama)
    with pytest.raises(UserError, match="vocabulary has 99 tokens, the model's"):
        check_draft(llama, dataclasses.replace(llama, vocab_size=99))
