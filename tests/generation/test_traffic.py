"""The engine under random traffic: every sequence is what the plain forward pass alone would write, and all memory comes back."""

import random
from dataclasses import replace

import pytest
import torch

from tests.generation.test_engine import Letters
from tests.models.conftest import pair
from tunesmith.generation.engine import Engine
from tunesmith.generation.reader import generating
from tunesmith.generation.sampler import Sampler, seen_in
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speculative import DraftModel, PromptLookup
from tunesmith.generation.text import continuation_text
from tunesmith.generation.writing import Drafter, Writing, random_numbers
from tunesmith.models.decoder import CausalLM


def alone(model: CausalLM, writing: Writing) -> tuple[list[int], list[float], str, str]:
    """Its tokens, their log-probabilities, its text and why it ends: without a cache, a batch or an engine."""
    sampling, prompt, ids, log_probs = writing.sampling, writing.prompt, [], []
    sampler = Sampler([sampling], torch.device("cpu"))
    while True:
        logits = model.logits(torch.tensor([prompt + ids]))[0, -1:]
        number = 0.0 if writing.numbers is None else writing.numbers[len(ids)]
        seen = seen_in(prompt, model.num_outputs, ids)[None]
        token = int(sampler.choose(logits, torch.tensor([number], dtype=torch.float64), seen))
        ids.append(token)
        log_probs.append(float(logits[0].log_softmax(-1)[token]))
        is_end = token in (Letters.stop_ids if sampling.stop_ids is None else sampling.stop_ids)
        text = continuation_text(Letters(), prompt, ids[:-1] if is_end else ids)
        cuts = [text.find(stop) for stop in sampling.stop if stop in text]
        if is_end or cuts:
            return ids, log_probs, text[: min(cuts, default=None)], "stop"
        if len(ids) == sampling.max_new_tokens or len(prompt) + len(ids) == model.config.context_length:
            return ids, log_probs, text, "length"


def some_prompts(chance: random.Random, context: int) -> list[list[int]]:
    """Some begin alike, with lengths about those of blocks."""
    common = chance.choices(range(3, 100), k=context)
    prompts = []
    for _ in range(chance.randint(2, 6)):
        own = chance.choices(range(3, 100), k=chance.choice([0, 1, 1, 2, 7, 31, 32, 33]))
        begins = common[: chance.choice([1, 16, 31, 32, 33, 40, 64])] if chance.random() < 0.7 else [5]
        prompts.append(chance.choice(prompts) if prompts and chance.random() < 0.3 else (begins + own)[: context - 1])
    return prompts


def some_sampling(chance: random.Random) -> Sampling:
    sampling = Sampling(chance.choice([1, 2, 5, 12, 36]), log_probs=True, stop_ids=chance.choice([None, (), (7, 2)]))
    changes = [
        {"temperature": chance.choice([0.5, 1.0, 1.5])},
        {"temperature": 1.0, "top_k": chance.choice([1, 5, 500]), "top_p": 0.9},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"presence_penalty": 0.7, "logit_bias": {5: 2.0}},
        {"stop": (chr(chance.randrange(20, 100)),)},
    ]
    for change in changes:
        if chance.random() < 0.3:
            sampling = replace(sampling, **change)
    return sampling


def some_drafter(chance: random.Random, model: CausalLM, cache_tokens: int) -> Drafter | None:
    if chance.random() < 0.4 or model.config.depends_on_length:
        return None
    if chance.random() < 0.5:
        return PromptLookup(chance.randint(1, 5), chance.randint(1, 3))
    return DraftModel(model, chance.choice([64, cache_tokens]), chance.randint(1, 5))


def scored(model: CausalLM, writing: Writing) -> list[float]:
    log_probs = model.logits(torch.tensor([writing.prompt[:-1]]))[0].log_softmax(-1)
    return [
        float(log_probs[place - 1, writing.prompt[place]]) for place in range(writing.score_from, len(writing.prompt))
    ]


@pytest.mark.parametrize("case", ["llama", "gemma2", "mistral window", "phi3 longrope long", "llama dynamic beyond"])
def test_random_traffic(case):
    """Few blocks (sequences start again), chunks and batches of any size, guesses, scoring in between, some dropped."""
    model = pair(case)[1]
    for seed in range(4):
        with torch.no_grad():
            run_traffic(model, random.Random(f"{case} {seed}"))


def run_traffic(model: CausalLM, chance: random.Random) -> None:
    context = model.config.context_length
    prompts = some_prompts(chance, context)
    samplings = [some_sampling(chance) for _ in prompts]
    writings = [
        Writing(prompt, sampling, number, random_numbers(sampling, 1, number, 0))
        for number, (prompt, sampling) in enumerate(zip(prompts, samplings))
    ]
    scoring = [
        Writing(prompt, Sampling(1), 100, score_from=chance.randint(1, len(prompt) - 1))
        for prompt in prompts[:2]
        if len(prompt) > 1
    ]
    cache_tokens = -(-context // 32) * 32 + 32 * chance.choice([0, 0, 1, 5])
    pieces = [""] * len(prompts)

    def on_text(index: int, piece: str) -> None:
        pieces[index] += piece

    drafter = some_drafter(chance, model, cache_tokens)
    chunk_size, shares = chance.choice([1, 3, 31, 32, 33, 1000]), chance.random() < 0.7
    engine = Engine(
        model, Letters(), chance.randint(1, 6), cache_tokens, chunk_size, shares, on_text=on_text, drafter=drafter
    )
    coming, ended, dropped = [*writings, *scoring], [], []
    chance.shuffle(coming)
    with generating(model):
        for _ in range(2000):
            if coming and chance.random() < 0.5:
                engine.add(coming.pop())
            if engine.running and chance.random() < 0.02:
                dropped.append(chance.choice(engine.running))
                engine.remove(dropped[-1])
            ended += engine.step()
            if not coming and not engine.is_busy:
                break
    assert {*ended, *dropped} == {*writings, *scoring} and len(ended) + len(dropped) == len(writings) + len(scoring)
    for reader in [engine.reader, *([drafter.reader] if isinstance(drafter, DraftModel) else [])]:
        assert reader.blocks.available == reader.pool.num_blocks
    for one in ended:
        if one.score_from is not None:
            assert [value for value, _ in one.scores] == pytest.approx(scored(model, one), abs=1e-4)
            continue
        ids, log_probs, text, reason = alone(model, one)
        assert (one.ids, one.finish_reason) == (ids, reason) and one.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert one.whole_text(Letters()) == pieces[one.index] == text
