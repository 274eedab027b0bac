"""Constrained output: whatever a model prefers, the text has the form, with every kind of tokenizer."""

import json
import random
import re
import sys

import jsonschema
import pytest
import torch

import tunesmith
from tests.conftest import TINY_LLAMA
from tests.models.conftest import build_empty
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import MissingExtra, UserError
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.constraints import Constraint
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.text import continuation_text

pytest.importorskip("llguidance")

TOKENIZERS = ["own", "gpt2", "llama2", "llama3", "qwen2.5"]
SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["é ü", "b", None, 1.5]}, "minItems": 1, "maxItems": 3},
            "at": {"type": "string", "format": "date"},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [{"const": "leaf"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}]}}},
    {"type": "string", "pattern": "^[a-z]{3}-(x|日本)$"},
    {"oneOf": [{"type": "boolean"}, {"type": "number", "exclusiveMinimum": 10, "maximum": 99}]},
]  # fmt: skip
PATTERNS = [
    r"[ab]{3}",
    r"(yes|no), ?[0-9]{1,3}( [äö漢]+)?\.",
    r" +x",
    r"[\u00c0-\uffff]+/[A-Z]+\n",
    r'"[^"\n]{2,5}"',
    ".?",
]


@pytest.fixture(scope="module")
def tokenizers(assets, tiny_model):
    return {name: load_tokenizer(tiny_model if name == "own" else assets / "tokenizers" / name) for name in TOKENIZERS}


@pytest.fixture(scope="module")
def own(tiny_model):
    return load_tokenizer(tiny_model)


def padded(tokenizer):
    return tokenizer.vocab_size + 71


def write(tokenizer, compiled, prompt, seed, most=200):
    """What a model that knows nothing writes: (text, its tokens, the matcher)."""
    generator = random.Random(seed)
    matcher, ids = compiled.start(prompt), []
    while not matcher.is_finished and len(ids) < most:
        token = generator.choice(matcher.allowed().nonzero().flatten().tolist())
        matcher.accept(token)
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
    return continuation_text(tokenizer, prompt, ids), ids, matcher


@pytest.mark.parametrize("name", TOKENIZERS)
def test_output_fits_its_schema(tokenizers, name):
    tokenizer, finished = tokenizers[name], 0
    for schema in SCHEMAS:
        compiled = Constraint.json_schema(schema).compile(tokenizer, padded(tokenizer), tokenizer.stop_ids)
        for seed in range(6):
            prompt = [] if seed % 3 == 0 else tokenizer.encode("Say: ")
            text, ids, matcher = write(tokenizer, compiled, prompt, seed)
            if matcher.is_finished:
                jsonschema.validate(json.loads(text), schema)
                finished += 1
            else:
                assert len(ids) == 200
    assert finished > 12


@pytest.mark.parametrize("name", TOKENIZERS)
def test_output_matches_its_regex(tokenizers, name):
    tokenizer = tokenizers[name]
    for pattern in PATTERNS:
        compiled = Constraint.regex(pattern).compile(tokenizer, padded(tokenizer), tokenizer.stop_ids)
        for seed in range(8):
            start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
            prompt = (start, [], tokenizer.encode("So"), tokenizer.encode("So: "))[seed % 4]
            text, ids, matcher = write(tokenizer, compiled, prompt, seed, most=60)
            if matcher.is_finished:
                assert re.fullmatch(pattern, text), (pattern, text, ids)
            else:
                assert len(ids) == 60


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "(" start? ")" | NUMBER\nNUMBER: /[0-9]{1,3}/',
        'root ::= "(" root? ")" | [0-9] [0-9]? [0-9]?',
    ],
)
def test_output_is_of_its_grammar(own, grammar):
    compiled = Constraint.grammar(grammar).compile(own, padded(own), own.stop_ids)
    for seed in range(20):
        text, _, matcher = write(own, compiled, [], seed)
        assert matcher.is_finished
        left, right = len(text) - len(text.lstrip("(")), len(text) - len(text.rstrip(")"))
        assert left == right and re.fullmatch("[0-9]{0,3}", text.strip("()")), text


def test_the_grammars_of_the_formats_are_told_apart(own):
    """A Lark grammar may hold GBNF's sign in a text."""
    compiled = Constraint.grammar('start: "::=" /x/').compile(own, padded(own), own.stop_ids)
    assert write(own, compiled, [], 0)[0] == "::=x"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_but_text_comes(tokenizers, name):
    """No special token, no place without a token; a stop token where the text may end."""
    tokenizer = tokenizers[name]
    compiled = Constraint.regex("(?s:.)*").compile(tokenizer, padded(tokenizer), tokenizer.stop_ids)
    allowed = compiled.start(tokenizer.encode("x")).allowed()
    assert allowed.shape == (padded(tokenizer),)
    expected = {number for number in tokenizer.special_ids if number in tokenizer.stop_ids}
    assert set(allowed[tokenizer.vocab_size :].tolist()) == {False}
    assert {number for number in tokenizer.special_ids if allowed[number]} == expected
    assert allowed.sum() > 0.7 * tokenizer.vocab_size


@pytest.mark.parametrize("prompt, drops", [("", True), ("Once", False)])
def test_the_space_that_sentencepiece_drops_at_the_beginning(tokenizers, prompt, drops):
    """Where a text begins, the model's own first token brings a space that the text has not; behind other text it has it."""
    tokenizer = tokenizers["llama2"]
    compiled = Constraint.regex("(Once| Once)").compile(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    ids = tokenizer.encode(prompt)
    with_space = tokenizer.token_to_id("▁Once")
    matcher = compiled.start(ids)
    matcher.accept(with_space)
    assert continuation_text(tokenizer, ids, [with_space]) == ("Once" if drops else " Once")
    assert compiled.start(ids).allowed()[tokenizer.token_to_id("On")] == (not drops)


def test_stops_where_the_text_may_end(own):
    a, b = (own.encode(letter)[0] for letter in "ab")
    for stops in ((0,), (0, 2, a), ()):
        compiled = Constraint.regex("bb(b|c)?").compile(own, own.vocab_size, stops)
        matcher = compiled.start([])
        for step in range(3):
            allowed = matcher.allowed()
            assert [bool(allowed[stop]) for stop in stops] == [step == 2] * len(stops)
            assert not matcher.is_finished
            matcher.accept(b)
        assert matcher.is_finished
        assert matcher.allowed().nonzero().flatten().tolist() == sorted(stops)
        if stops:
            matcher.accept(stops[-1])
            assert matcher.is_finished


def test_a_stop_token_that_is_also_text_ends_it(own):
    """A user may stop at a letter: it then is no text any more, and comes only where the text may end."""
    a, b = (own.encode(letter)[0] for letter in "ab")
    matcher = Constraint.regex("(a|b)b").compile(own, own.vocab_size, [a]).start([])
    assert matcher.allowed().nonzero().flatten().tolist() == [b]
    with pytest.raises(ValueError, match=f"token {a} can't come next"):
        matcher.accept(a)


def test_sequences_go_their_own_ways(own):
    a, b = (own.encode(letter)[0] for letter in "ab")
    compiled = Constraint.regex("(ab|ba)").compile(own, own.vocab_size, [0])
    one = compiled.start([])
    one.accept(a)
    two, copy = compiled.start([]), one.copy()
    two.accept(b)
    copy.accept(b)
    assert (one.allowed()[b], two.allowed()[a], copy.is_finished, one.is_finished) == (True, True, True, False)


def test_the_empty_text(own):
    matcher = Constraint.regex("").compile(own, own.vocab_size, [0]).start([])
    assert matcher.is_finished and matcher.allowed().nonzero().flatten().tolist() == [0]


def test_tokens_that_are_added_later_count(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    constraint = Constraint.regex("<think>")
    constraint.compile(tokenizer, 400, tokenizer.stop_ids)
    tokenizer.add_tokens(["<think>"], special=False)
    allowed = constraint.compile(tokenizer, 400, tokenizer.stop_ids).start([]).allowed()
    assert allowed[tokenizer.token_to_id("<think>")]


def test_a_grammar_may_name_special_tokens(own):
    compiled = Constraint.grammar('start: <|im_start|> "x"').compile(own, own.vocab_size, [0])
    assert compiled.start([]).allowed().nonzero().flatten().tolist() == [own.token_to_id("<|im_start|>")]


def test_json_may_be_indented_but_not_padded_for_ever(own):
    compiled = Constraint.json_schema({"type": "array", "items": {"type": "null"}}).compile(own, own.vocab_size, [0])
    text = json.dumps([None, None], indent=8)
    matcher = compiled.start([])
    for token in own.encode(text):
        matcher.accept(token)
    assert matcher.is_finished
    matcher, (bracket, space) = compiled.start([]), (own.encode("[")[0], own.encode(" ")[0])
    matcher.accept(bracket)
    matcher.accept(space)
    assert not matcher.allowed()[space]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Constraint.regex("a(b"), r"the regex a\(b can't be used: unclosed group"),
        (lambda: Constraint.regex(r"(a)\1"), "can't be used: backreferences are not supported"),
        (lambda: Constraint.json_schema({"type": "objct"}), "the JSON schema can't be used: Invalid type: objct"),
        (lambda: Constraint.json_schema({"not": {}}), 'Unimplemented keys: ."not".'),
        (lambda: Constraint.json_schema({"type": "string", "pattern": "a(b"}), "unclosed group"),
        (lambda: Constraint.json_schema({"minimum": 3, "maximum": 1, "type": "number"}), "minimum .3. is greater"),
        (lambda: Constraint.json_schema('{"type": '), "the JSON schema is no JSON .*line 1"),
        (lambda: Constraint.json_schema("3"), "schema must be an object or boolean"),
        (lambda: Constraint.grammar("start: x"), r'the grammar can\'t be used: at 1\(8\): unknown name: "x"'),
        (lambda: Constraint.grammar("root ::= ("), "the grammar can't be used: .*Expected"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(make, words):
    with pytest.raises(UserError, match=words) as raised:
        make().check()
    assert "\n" not in str(raised.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constraint = Constraint.regex("a")
    with pytest.raises(
        MissingExtra, match=r"constrained output needs the package llguidance.*tunesmith\[constraints\]"
    ):
        constraint.check()


def test_a_vocabulary_that_lacks_what_must_come():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    from tunesmith.data.tokenizer import Tokenizer

    backend = Backend(models.BPE(vocab={"a": 0, "▁": 1}, merges=[]))
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    compiled = Constraint.regex("aé").compile(Tokenizer(backend, tokens={}), 2, [])
    matcher = compiled.start([])
    matcher.accept(0)
    with pytest.raises(UserError, match="the regex aé can't be kept: the tokenizer has no token"):
        matcher.allowed()


# Through the engine ----------------------------------------------------------------------------------------------------


def random_model(vocab_size):
    """Two small layers that prefer what they like."""
    shape = {**TINY_LLAMA, "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    model = build_empty(shape)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", TOKENIZERS)
def test_models_write_what_fits(tokenizers, name):
    """Hot and greedy samples, beside sequences that are free; a vocabulary of the model that is larger than the tokenizer's."""
    tokenizer = tokenizers[name]
    model = random_model(padded(tokenizer))
    constraints = [Constraint.json_schema(schema) for schema in SCHEMAS] + [Constraint.regex(p) for p in PATTERNS[:2]]
    samplings = [
        Sampling(max_new_tokens=60, temperature=0.0 if index % 2 else 1.5, seed=index, num_samples=2, constraint=one)
        for index, one in enumerate([*constraints, None])
    ]
    prompts = ["So"] * len(samplings)
    made = generate_completions(model, tokenizer, prompts, samplings, batch_size=5, chat=False)
    for sampling, one in zip([sampling for sampling in samplings for _ in range(2)], made):
        constraint = sampling.constraint
        if one.finish_reason == "length" or constraint is None:
            assert len(one.ids) == 60 or constraint is None
        elif constraint.kind == "regex":
            assert re.fullmatch(constraint.text, one.text)
        else:
            jsonschema.validate(json.loads(one.text), json.loads(constraint.text))
    assert sum(one.finish_reason == "stop" for one in made) >= len(made) // 2
    alone = generate_completions(model, tokenizer, ["So"], samplings[0], batch_size=1, chat=False)
    assert [one.ids for one in alone] == [one.ids for one in made[:2]]


def test_a_form_beside_stop_strings_streams_and_log_probabilities(own):
    model, pieces = random_model(own.vocab_size), []
    sampling = Sampling(
        40, 1.0, stop=("c",), seed=1, log_probs=True, stop_ids=(), constraint=Constraint.regex("[ab]{5}cd")
    )
    (one,) = generate_completions(
        model, own, ["the"], sampling, chat=False, on_text=lambda index, piece: pieces.append(piece)
    )
    assert re.fullmatch("[ab]{5}", one.text) and "".join(pieces) == one.text and one.finish_reason == "stop"
    assert one.log_probs is not None and len(one.log_probs) == len(one.ids)
    sampling = Sampling(40, 1.0, seed=1, stop_ids=(), constraint=Constraint.regex("[ab]{5}cd"))
    (one,) = generate_completions(model, own, ["the"], sampling, chat=False)
    assert re.fullmatch("[ab]{5}cd", one.text) and one.finish_reason == "stop"


def test_a_real_model_fills_in_a_form(assets):
    """The tiny model of stories knows how to go on within it."""
    folder = assets / "models" / "stories260K"
    model, tokenizer = tunesmith.load_model(folder), load_tokenizer(folder)
    constraint = Constraint.regex(r" there was a little (girl|boy) named [A-Z][a-z]+\.")
    text = tunesmith.generate(model, tokenizer, ["Once upon a time,"], 40, constraint=constraint)[0]
    assert text == " there was a little girl named Lily."
