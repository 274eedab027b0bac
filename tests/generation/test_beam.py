"""Beam search: the same texts as transformers finds, in the same order."""

import pytest
import torch

from tests.generation.test_engine import Letters
from tests.models.conftest import CASES, pair, tokens
from tunesmith.errors import UserError
from tunesmith.generation.beam import Beams, search_completions
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.reader import Reader
from tunesmith.generation.sampling import Sampling

PLAIN = [
    case for case in CASES if case.split()[0] == case or case in ("phi3 longrope short", "qwen3 tied biased windows")
]


def prompts_of(*lengths):
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def transformers_beams(reference, prompt, beams, count, ends, returned):
    output = reference.generate(
        torch.tensor([prompt]),
        do_sample=False,
        num_beams=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=returned,
        max_new_tokens=count,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    texts = []
    for row in output[:, len(prompt) :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts


def beams_of(model, prompts, beams, count, ends, returned, **options):
    found = search_completions(
        model, Letters(), prompts, beams, count, num_samples=returned, stop_ids=ends, chat=False, **options
    )
    return [[one.ids for one in found[start : start + returned]] for start in range(0, len(found), returned)]


@pytest.mark.parametrize("case", PLAIN)
def test_every_family_as_transformers(case):
    reference, model = pair(case)
    prompts, beams = prompts_of(3, 11, 20), Beams(3)
    expected = [transformers_beams(reference, prompt, beams, 14, {2, 40}, 3) for prompt in prompts]
    assert beams_of(model, prompts, beams, 14, {2, 40}, 3) == expected


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_when_it_stops_and_what_is_best(llama, early_stopping, length_penalty, num_beams):
    """Many tokens end a text, so that texts of all lengths compete."""
    reference, model = llama
    beams, ends = Beams(num_beams, length_penalty, early_stopping), set(range(2, 101, 4))
    prompts = prompts_of(2, 5, 17)
    expected = [transformers_beams(reference, prompt, beams, 20, ends, num_beams) for prompt in prompts]
    found = beams_of(model, prompts, beams, 20, ends, num_beams)
    assert found == expected
    assert len({len(ids) for texts in found for ids in texts}) > 1 or length_penalty == 2.5


@pytest.fixture(scope="module")
def llama():
    return pair("llama", max_position_embeddings=256)


def test_what_is_searched_beside_changes_nothing(llama):
    _, model = llama
    prompts = prompts_of(30, 3, 90, 41)
    alone = beams_of(model, prompts, Beams(4), 40, {2}, 4, batch_size=1)
    assert beams_of(model, prompts, Beams(4), 40, {2}, 4, batch_size=16) == alone


def test_one_beam_is_greedy(llama):
    _, model = llama
    prompts = prompts_of(30, 3, 41)
    greedy = generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=40), chat=False)
    found = search_completions(model, Letters(), prompts, Beams(1), 40, chat=False)
    assert [(one.ids, one.text, one.finish_reason) for one in found] == [
        (one.ids, one.text, one.finish_reason) for one in greedy
    ]


def test_frequencies_that_change_with_the_length():
    """Each beam is read anew where its rotary frequencies change; without a cache transformers does the same."""
    reference, model = pair("llama dynamic beyond")
    (prompt,) = prompts_of(20)
    found = beams_of(model, [prompt], Beams(2), 10, set(), 2)
    reference.generation_config.use_cache = False
    assert found == [transformers_beams(reference, prompt, Beams(2), 10, set(), 2)]


def test_all_blocks_come_back(llama, monkeypatch):
    _, model = llama
    made = []
    init = Reader.__init__

    def remembered(self, *words, **options):
        init(self, *words, **options)
        made.append(self)

    monkeypatch.setattr(Reader, "__init__", remembered)
    beams_of(model, prompts_of(30, 3, 64), Beams(4), 40, set(range(2, 101, 9)), 4, batch_size=12)
    assert all(reader.blocks.available == reader.pool.num_blocks for reader in made) and made


def test_bad_options(llama):
    with pytest.raises(ValueError, match="`num_beams` must be at least 1, got 0"):
        Beams(0)
    with pytest.raises(ValueError, match="`early_stopping` must be true, false or never, got 'sometimes'"):
        Beams(early_stopping="sometimes")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompt 0 has 300 tokens"):
        search_completions(llama[1], Letters(), [[5] * 300], Beams(), chat=False)


def test_ranks_that_search_together_agree(llama):
    """What another rank rounds another way does not lead it apart: it takes what the first has found."""
    _, model = llama
    prompts, told = prompts_of(30, 3), []
    first = beams_of(model, prompts, Beams(3), 20, {2}, 3, agree=lambda found: told.append(found.clone()) or found)
    heard = iter(told)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
        try:
            other = beams_of(model, prompts, Beams(3), 20, {2}, 3, agree=lambda found: next(heard))
            apart = beams_of(model, prompts, Beams(3), 20, {2}, 3)
        finally:
            model.lm_head.weight.mul_(-1.0)
    assert other == first != apart
