"""Scores of continuations against transformers, one sequence at a time."""

import pytest
import torch

from tests.models.conftest import CASES, pair, tokens
from tunesmith.generation.score import score


def one_by_one(reference, context, continuation):
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_probs = reference(ids[:, :-1]).logits.float().log_softmax(-1)[0, len(context) - 1 :]
    targets = torch.tensor(continuation)
    values = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return values, bool((log_probs.argmax(-1) == targets).all())


def likeliest(reference, context, count):
    ids = list(context)
    for _ in range(count):
        with torch.no_grad():
            ids.append(reference(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(context) :]


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_transformers(case):
    reference, model = pair(case)
    reference.eval()
    ids = [tokens(1, length, seed=length)[0].tolist() for length in (20, 9, 31, 2, 14, 20)]
    pairs = [(row[:-cut], row[-cut:]) for row, cut in zip(ids, (4, 1, 12, 1, 13, 19))]
    pairs += [(pairs[0][0], likeliest(reference, pairs[0][0], 3)), (pairs[0][0], [5]), (pairs[0][0], [])]
    for batch_tokens in (1, 40, 4096):
        found = score(model, pairs, batch_tokens)
        for (context, continuation), scored in zip(pairs, found, strict=True):
            values, is_greedy = one_by_one(reference, context, continuation)
            assert scored.log_probs == pytest.approx(values.tolist(), abs=1e-4)
            assert scored.is_greedy == is_greedy
            assert scored.log_prob == pytest.approx(values.sum().item(), abs=5e-4)
    if not model.config.depends_on_length:  # or a longer text has other frequencies than those it was written with
        assert found[6].is_greedy
    assert not found[0].is_greedy and model.training


def test_nothing_to_score():
    assert score(pair("llama")[1], []) == []


def test_what_contexts_have_in_common_is_read_once():
    model = pair("llama")[1]
    common = tokens(1, 40, seed=0)[0].tolist()
    contexts = [[*common, *tokens(1, size, seed=size)[0].tolist()] for size in (3, 9)]
    answers = [tokens(1, size, seed=size)[0].tolist() for size in (5, 1, 7, 4)]
    pairs = [(context, answer) for context in contexts for answer in answers]
    expected = [score(model, [one])[0].log_probs for one in pairs]
    read = []
    with model.model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].numel())):
        found = score(model, pairs)
    for one, alone in zip(found, expected):
        assert one.log_probs == pytest.approx(alone, abs=1e-5)
    # The first context, of the second what is not in the first's full block of 32, and every answer.
    assert sum(read) == 43 + (49 - 32) + 2 * sum(map(len, answers))
