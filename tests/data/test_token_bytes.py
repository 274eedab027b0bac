"""A text is its tokens' bytes one after the other: what decode() says, token by token."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tunesmith.data.token_bytes import token_bytes
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.errors import UserError

ASSETS = Path(__file__).parents[2] / ".." / "shared" / "assets" / "tokenizers"
TEXT = ["Grüße, 你好! {\"name\": [1, 2.50, true]}\n\tdef f(x):  return '\\u00e9'", "the cat sat on the mat " * 9]


def byte_level(vocab_size=300):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens(["<think>", "two words", "naïve"])
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(backend, tokens={"eos_token": "</s>"})


def metaspace():
    words = {"<unk>": 0, "▁the": 1, "▁": 2, "c": 3, "at": 4, "▁cat": 5}
    backend = Backend(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, tokens={"unk_token": "<unk>"})


def made(name):
    if name in ("byte_level", "metaspace"):
        return globals()[name]()
    if not (ASSETS / name).exists():
        pytest.skip("needs the shared assets")
    return load_tokenizer(ASSETS / name)


@pytest.mark.parametrize(
    "name", ["byte_level", "metaspace", "gpt2", "gpt2/gpt2.tiktoken", "qwen2.5", "llama2", "llama3", "mistral/tokenizer.model.v1"]
)  # fmt: skip
def test_bytes_are_what_decode_says(name):
    tokenizer = made(name)
    found = token_bytes(tokenizer)
    assert len(found.of) == tokenizer.vocab_size
    order = random.Random(0)
    ids = [number for number in range(tokenizer.vocab_size) if tokenizer.id_to_token(number) is not None]
    for number in order.sample(ids, min(len(ids), 2000)):
        whole = b"".join(found.of[one] for one in (number, number))
        expected = whole.decode(errors="replace")
        if found.drops_first_space:
            expected = expected.removeprefix(" ")
        if "\ufffd" not in expected:
            assert tokenizer.decode([number, number]) == expected, tokenizer.id_to_token(number)
    for _ in range(200):  # real texts, in which characters are spread over tokens
        text = "".join(order.choice("aé漢🙂 \n\t<>{}0") for _ in range(30))
        if name != "metaspace":
            ids = tokenizer.encode(text, add_special_tokens=False)
            joined = b"".join(found.of[one] for one in ids).decode()
            assert (joined.removeprefix(" ") if found.drops_first_space else joined) == tokenizer.decode(ids) == text


def test_special_tokens_are_no_text():
    tokenizer = byte_level()
    found = token_bytes(tokenizer)
    assert found.of[tokenizer.eos_id] == b""
    assert found.of[tokenizer.token_to_id("two words")] == b"two words"
    assert found.begins_text([]) and found.begins_text([tokenizer.eos_id]) and found.begins_text([99_999])
    assert not found.begins_text([tokenizer.eos_id, 5])


@pytest.mark.parametrize(
    "decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.Replace("_", " "), decoders.Strip("x", 1, 0)])]
)
def test_decoders_that_do_more_are_refused(decoder):
    tokenizer = byte_level()
    if decoder is None:
        backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
        tokenizer = Tokenizer(backend, tokens={})
    else:
        tokenizer.backend.decoder = decoder
    with pytest.raises(UserError, match="does not say which bytes its tokens stand for"):
        token_bytes(tokenizer)
