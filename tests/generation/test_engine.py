"""Generation: the same tokens as transformers, in any batch; stops, streams, seeds."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from tests.models.conftest import CASES, build_empty, pair, take_weights, tokens
from tunesmith.data.stream_decoder import StreamDecoder
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.completions import Completion, generate, generate_completions
from tunesmith.generation.engine import Engine
from tunesmith.generation.reader import generating
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.writing import Writing, random_numbers
from tunesmith.hub import read_json
from tunesmith.models.decoder import CausalLM
from tunesmith.nn import kv_cache, linear


class Letters:
    """A tokenizer of letters: 65 is A."""

    chat_template = bos_id = None
    stop_ids = frozenset({2})

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(number) for number in ids if number not in (0, 2))

    def stream_decoder(self):
        return StreamDecoder(self.decode)


class Script:
    """Stands for a model that writes a given text after any prompt."""

    training = False

    def __init__(self, model: CausalLM, text: str):
        self.config, self.model, self.text, self.lm_head, self.calls = model.config, model.model, text, self, 0

    def eval(self):
        pass

    def train(self, mode):
        pass

    def modules(self):
        return ()

    def length_class(self, length):
        return ()

    def length_matters(self, old, new):
        return False

    def __call__(self, ids, cache=None):
        self.calls += 1
        return torch.full((*ids.shape, 1), float(self.calls - 1))

    def logits(self, hidden):
        return torch.nn.functional.one_hot(
            torch.tensor([ord(self.text[int(call)]) for call in hidden.flatten()]), 128
        ).float()


def load(folder):
    model = build_empty(read_json(folder / "config.json"))
    take_weights(model, load_file(folder / "model.safetensors"))
    return model


def prompts_of(*lengths):
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def transformers_greedy(reference, ids, count, **options):
    """Alone, without padding. Where frequencies depend on the length, transformers' cache keeps keys of other lengths: without a cache it is right."""
    depends = reference.config.rope_parameters.get("rope_type") in ("dynamic", "longrope")
    output = reference.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=0, use_cache=not depends, **options
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers_on_every_family_in_a_ragged_batch(case):
    reference, model = pair(case)
    prompts = prompts_of(3, 17, 9)
    completions = generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=18))
    for prompt, completion in zip(prompts, completions):
        assert completion.ids == transformers_greedy(reference, prompt, 18)
        assert completion.finish_reason == ("stop" if completion.ids[-1] == 2 else "length")


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "llama dynamic beyond"])
def test_greedy_equals_transformers_by_the_kernels_for_larger_models(case, monkeypatch):
    """Packed matrices, and attention block by block: what a model of this size would not get."""
    monkeypatch.setattr(linear, "_SMALL", 0)
    monkeypatch.setattr(kv_cache, "_FEW_NUMBERS", 0)
    test_greedy_equals_transformers_on_every_family_in_a_ragged_batch(case)


@pytest.fixture(scope="module")
def llama():
    return pair("llama")


@pytest.fixture(scope="module")
def model(llama):
    return llama[1]


def test_repetition_penalty_equals_transformers(llama):
    reference, model = llama
    prompts = prompts_of(5, 11)
    completions = generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=20, repetition_penalty=1.4))
    for prompt, completion in zip(prompts, completions):
        assert completion.ids == transformers_greedy(reference, prompt, 20, repetition_penalty=1.4)


SAMPLING = Sampling(
    max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7, num_samples=2
)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]


def test_a_sequence_is_the_same_whatever_else_is_in_the_batch(model):
    prompts = prompts_of(4, 9, 4, 13, 2)
    expected = ids_of(generate_completions(model, Letters(), prompts, SAMPLING, batch_size=1))
    for batch_size in (2, 3, 10, 64):
        assert ids_of(generate_completions(model, Letters(), prompts, SAMPLING, batch_size=batch_size)) == expected
    assert ids_of(generate_completions(model, Letters(), prompts[:2], SAMPLING)) == expected[:4]


def test_seeds(model):
    prompts = prompts_of(6) * 2
    first = ids_of(generate_completions(model, Letters(), prompts, SAMPLING))
    assert first == ids_of(generate_completions(model, Letters(), prompts, SAMPLING))
    assert len(set(map(tuple, first))) == 4
    torch.manual_seed(0)
    state = torch.get_rng_state()
    other = ids_of(generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=12, temperature=1.0)))
    assert other != ids_of(
        generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=12, temperature=1.0))
    )
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("small", [1 << 16, 0], ids=["small", "as if large"])
def test_log_probabilities_are_the_models_own(model, small, monkeypatch):
    monkeypatch.setattr(linear, "_SMALL", small)
    prompts = prompts_of(6, 3)
    for options in (
        Sampling(max_new_tokens=9, log_probs=True),
        Sampling(max_new_tokens=9, temperature=1.5, top_k=50, seed=0, log_probs=True),
    ):
        for completion in generate_completions(model, Letters(), prompts, options):
            whole = torch.tensor([completion.prompt_ids + completion.ids])
            values = model.logits(whole)[0, len(completion.prompt_ids) - 1 : -1].log_softmax(-1)
            expected = values.gather(-1, torch.tensor(completion.ids)[:, None]).squeeze(-1)
            assert completion.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def test_streamed_pieces_join_to_the_texts(model):
    prompts = prompts_of(4, 9, 5)
    pieces: dict[int, str] = {}

    def on_text(index, piece):
        pieces[index] = pieces.get(index, "") + piece

    completions = generate_completions(model, Letters(), prompts, SAMPLING, batch_size=2, on_text=on_text)
    assert [pieces[index] for index in range(6)] == [completion.text for completion in completions]
    assert [completion.text for completion in generate_completions(model, Letters(), prompts, SAMPLING)] == [
        c.text for c in completions
    ]


@pytest.mark.parametrize(
    "stop, text, count",
    [
        (("lo w",), "hel", 7),
        (("w", "o"), "hell", 5),
        (("world!",), "hello ", 12),
        (("llama",), "hello world!", 12),
        (("!",), "hello world", 12),
        (("ll", "hello w"), "he", 4),
        (("o world",), "hell", 11),
    ],
)
def test_stop_strings_cut_the_text(model, stop, text, count):
    script = Script(model, "hello world!")
    streamed: list[str] = []
    sampling = Sampling(max_new_tokens=12, stop=stop)
    (completion,) = generate_completions(
        script, Letters(), [[5, 6]], sampling, on_text=lambda index, piece: streamed.append(piece)
    )
    assert completion.text == "".join(streamed) == text
    assert len(completion.ids) == count
    assert completion.finish_reason == ("stop" if text != "hello world!" else "length")


def test_a_stop_string_is_not_streamed_in_parts(model):
    streamed: list[str] = []
    generate_completions(
        Script(model, "abXYcdXYZ"),
        Letters(),
        [[5, 6]],
        Sampling(max_new_tokens=9, stop=("XYZ",)),
        on_text=lambda i, piece: streamed.append(piece),
    )
    assert streamed == ["a", "b", "XYc", "d"]


def test_stop_tokens_end_a_sequence_and_others_go_on(model):
    prompts = prompts_of(4, 9, 5, 12)
    free = ids_of(generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=15, stop_ids=())))
    ends = {free[0][3], free[2][7]}
    completions = generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=15, stop_ids=tuple(ends)))
    for ids, completion in zip(free, completions):
        first = min((ids.index(end) for end in ends if end in ids), default=None)
        assert completion.ids == (ids if first is None else ids[: first + 1])
        assert completion.finish_reason == ("length" if first is None else "stop")
        assert completion.text == Letters().decode(ids[:first])


def test_the_context_bounds_prompt_and_text(model):
    context = model.config.context_length
    (completion,) = generate_completions(
        model, Letters(), prompts_of(context - 3), Sampling(max_new_tokens=50, stop_ids=())
    )
    assert len(completion.ids) == 3 and completion.finish_reason == "length"
    long, short = generate_completions(
        model, Letters(), prompts_of(context - 3, 4), Sampling(max_new_tokens=50, stop_ids=())
    )
    assert long.ids == completion.ids and len(short.ids) == 50
    for prompts, message in [
        (
            prompts_of(3, context),
            rf"prompt 1 has {context} tokens, but the model's context holds {context} with the answer",
        ),
        ([[]], "prompt 0 has no tokens"),
        ([[5, 101]], "prompt 0 holds a token id outside the model's 101"),
        ([{"role": "user", "content": "x"}], "put it in a list"),
    ]:
        with pytest.raises(UserError, match=message):
            generate_completions(model, Letters(), prompts, Sampling())


def test_stretched_positions_stretch_the_context():
    assert pair("llama linear")[1].config.context_length == 192
    assert pair("llama yarn")[1].config.context_length == 64
    assert pair("llama dynamic beyond")[1].config.context_length == 48


def test_a_model_in_training_is_left_as_it_was_and_learns_on(llama):
    model = pair("llama")[1].train()
    generate(model, Letters(), prompts_of(5), 4)
    assert model.training
    loss = model.lm_head.cross_entropy(model(tokens(2, 8)), tokens(2, 8, seed=1))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert generate(model, Letters(), []) == []


def test_bfloat16(model):
    half = pair("llama", torch.bfloat16)[1]
    (completion,) = generate_completions(half, Letters(), prompts_of(7), Sampling(max_new_tokens=8, log_probs=True))
    assert len(completion.ids) <= 8
    assert completion.log_probs is not None and all(value <= 0 for value in completion.log_probs)


def test_conversations_and_chat_prompts_read_the_template(tiny_model):
    model = load(tiny_model)
    tokenizer = load_tokenizer(tiny_model)
    messages = [{"role": "user", "content": "Hello there"}]
    rendered = tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), add_special_tokens=False)
    sampling = Sampling(max_new_tokens=5)
    for prompt, chat in ((messages, False), ("Hello there", True), ("Hello there", None)):
        (completion,) = generate_completions(model, tokenizer, [prompt], sampling, chat=chat)
        assert completion.prompt_ids == rendered
    (completion,) = generate_completions(model, tokenizer, ["Hello there"], sampling, chat=False)
    assert completion.prompt_ids == tokenizer.encode("Hello there")
    assert generate(model, tokenizer, "Hello there", 5) == [completion.text]


STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, Lily. We can help you.\""""


def test_a_real_model_tells_the_published_story(assets):
    folder = assets / "models" / "stories260K"
    model = load(folder)
    tokenizer = load_tokenizer(folder)
    pieces: list[str] = []
    (completion,) = generate_completions(
        model,
        tokenizer,
        [""],
        Sampling(max_new_tokens=400, stop_ids=(1,)),
        chat=False,
        on_text=lambda index, piece: pieces.append(piece),
    )
    assert completion.prompt_ids == [1]
    assert completion.text.startswith(STORY)
    assert "".join(pieces) == completion.text and len(pieces) > 100
    assert generate(model, tokenizer, [""], 400, stop_ids=(1,)) == [completion.text]
    both = generate(model, tokenizer, ["Once upon a time", "Once upon a time, there was"], 12)
    assert both[0].startswith(",") and both[1].startswith(" a little")


def test_scores_are_exactly_those_of_a_training_step(model):
    """To the bit, on the batch that a trainer makes of the sequence; the engine's own agree to rounding."""
    prompts = prompts_of(6, 11)
    options = Sampling(max_new_tokens=9, temperature=1.2, seed=0, log_probs=True)
    own = generate_completions(model, Letters(), prompts, options)
    exact = generate_completions(model, Letters(), prompts, options, exact_logprobs=True)
    for loose, completion in zip(own, exact):
        assert completion.ids == loose.ids and completion.log_probs == pytest.approx(loose.log_probs, abs=1e-5)
        tokens = torch.tensor(completion.prompt_ids + completion.ids)
        length = -(-(len(tokens) - 1) // 8) * 8
        inputs = torch.nn.functional.pad(tokens[:-1], (0, length - len(tokens) + 1))[None]
        labels = torch.full_like(inputs, -100)
        labels[0, len(completion.prompt_ids) - 1 : len(tokens) - 1] = torch.tensor(completion.ids)
        trained = copy.deepcopy(model).train().requires_grad_(True)
        hidden = trained(inputs, torch.arange(length)[None])
        values = trained.lm_head.log_probs(hidden, labels)[0]
        assert values[labels[0] != -100].tolist() == completion.log_probs


def test_each_prompt_has_its_own_options(model):
    prompts = prompts_of(5, 8, 6)
    options = [
        Sampling(max_new_tokens=4),
        Sampling(max_new_tokens=9, temperature=1.0, top_k=20, seed=3, num_samples=2, log_probs=True),
        Sampling(max_new_tokens=7, repetition_penalty=1.5, stop=("A",)),
    ]
    together = generate_completions(model, Letters(), prompts, options, batch_size=3)
    alone = [
        completion
        for place, (prompt, option) in enumerate(zip(prompts, options))
        for completion in generate_completions(model, Letters(), [prompt], option, places=[place])
    ]
    assert [one.text for one in together] == [one.text for one in alone] and ids_of(together) == ids_of(alone)
    assert [one.log_probs is None for one in together] == [True, False, False, True]


@pytest.mark.parametrize("case", ["llama", "gemma2", "llama dynamic beyond"])
def test_samples_of_a_prompt_read_it_once(case):
    model = pair(case)[1]
    prompt, other = prompts_of(40, 7)
    read = 0

    def count(module, arguments):
        nonlocal read
        read += arguments[0].numel()

    options = Sampling(max_new_tokens=6, temperature=1.0, seed=0, num_samples=5, stop_ids=())
    alone = [ids for sample in range(5) for ids in [generate_one(model, prompt, options, sample)]]
    with model.model.register_forward_pre_hook(count):
        together = generate_completions(model, Letters(), [prompt, other], options, batch_size=4)
    assert ids_of(together)[:5] == alone
    if not model.config.depends_on_length:  # whose texts outgrow what was read
        # Each prompt once, then its last token again for each further sample, and five more tokens for each of ten.
        assert read == 40 + 7 + 2 * 4 + 10 * 5


def generate_one(model, prompt, options, sample):
    engine = Engine(model, Letters(), 1, 200)
    writing = Writing(prompt, options, 0, random_numbers(options, 0, 0, sample))
    with generating(model):
        engine.add(writing)
        while engine.is_busy:
            engine.step()
    return writing.ids


def test_long_prompts_are_read_in_chunks_beside_sequences_that_go_on(model):
    prompts = prompts_of(5, 60, 6, 55)
    expected = generate_completions(model, Letters(), prompts, Sampling(max_new_tokens=20, stop_ids=()))
    engine = Engine(model, Letters(), 4, 2000, chunk_size=16)
    writings = [Writing(ids, Sampling(max_new_tokens=20, stop_ids=()), place) for place, ids in enumerate(prompts)]
    widest = 0
    with generating(model):
        for one in writings:
            engine.add(one)
        while engine.is_busy:
            before = sum(len(one.ids) for one in writings)
            engine.step()
            if any(one.memory.unread > 1 for one in writings):  # prompts are still read
                widest = max(widest, sum(len(one.ids) for one in writings) - before)
    assert [one.ids for one in writings] == ids_of(expected) and widest >= 1


def test_sequences_join_while_others_are_written(model):
    prompts = prompts_of(5, 9, 6)
    options = Sampling(max_new_tokens=12, stop_ids=())
    expected = ids_of(generate_completions(model, Letters(), prompts, options))
    engine = Engine(model, Letters(), 3, 300)
    ended = []
    with generating(model):
        for number, prompt in enumerate(prompts):
            engine.add(Writing(prompt, options, number))
            ended += [one for _ in range(3) for one in engine.step()]
        dropped = Writing(prompts[0], options, 7)
        engine.add(dropped)
        ended += engine.step()
        engine.remove(dropped)
        while engine.is_busy:
            ended += engine.step()
    assert {one.index: one.ids for one in ended} == dict(enumerate(expected))
    assert engine.reader.blocks.available == engine.reader.pool.num_blocks


def test_a_sequence_may_be_dropped_as_its_text_comes(model):
    """As when whoever asked for it hangs up: itself, one whose token of the same pass is not taken yet, one that would end."""
    prompts = prompts_of(5, 9, 6, 11)
    options = Sampling(max_new_tokens=6, stop_ids=())
    expected = ids_of(generate_completions(model, Letters(), prompts, options))
    writings = [Writing(prompt, options, number) for number, prompt in enumerate(prompts)]

    def on_text(index, piece):
        if index == 0 and len(writings[0].ids) == 3:
            engine.remove(writings[0])
            engine.remove(writings[1])
        if index == 2 and len(writings[2].ids) == 6:
            engine.remove(writings[2])

    engine = Engine(model, Letters(), 4, 300, on_text=on_text)
    ended = []
    with generating(model):
        for one in writings:
            engine.add(one)
        while engine.is_busy:
            ended += engine.step()
    assert ended == [writings[3]] and [len(one.ids) for one in writings] == [3, 2, 6, 6]
    assert writings[3].ids == expected[3]
    assert engine.reader.blocks.available == engine.reader.pool.num_blocks


def test_what_many_begin_with_is_remembered(model):
    """Few-shot examples, a system prompt: read by the first, and kept for those that come later."""
    common = prompts_of(40)[0]
    prompts = [[*common, *tail] for tail in prompts_of(5, 9, 12, 7)]
    options = Sampling(max_new_tokens=6, stop_ids=())
    expected = ids_of(generate_completions(model, Letters(), prompts, options, batch_size=1))
    read = []
    with model.model.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0].numel())):
        found = generate_completions(model, Letters(), prompts, options, batch_size=2)
    assert ids_of(found) == expected
    assert sum(read) == len(prompts[0]) + sum(len(ids) - 32 for ids in prompts[1:]) + 4 * 5


def test_a_cache_that_can_not_hold_a_sequence_is_refused(model):
    with pytest.raises(UserError, match="may come to 34 tokens, but the cache holds 32"):
        generate_completions(model, Letters(), prompts_of(24), Sampling(max_new_tokens=10), cache_tokens=32)
    context = model.config.context_length
    with pytest.raises(UserError, match=f"{context} tokens leave no room in the model's context of {context}"):
        Engine(model, Letters()).add(Writing(prompts_of(context)[0], Sampling()))


def test_options_are_one_for_each_prompt(model):
    with pytest.raises(ValueError, match="shorter"):
        generate_completions(model, Letters(), prompts_of(3, 4), [Sampling()])
