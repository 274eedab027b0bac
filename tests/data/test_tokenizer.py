"""The tokenizer: ids equal the original libraries' on hard texts, streaming, special tokens, files, errors."""

import json
import random
import shutil

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tunesmith.data import sentencepiece_files, tokenizer_files
from tunesmith.data.stream_decoder import StreamDecoder
from tunesmith.data.tokenizer import load_tokenizer
from tunesmith.errors import UserError

HARD = [
    "",
    "hello",
    " hello",
    "   hello  world   ",
    "\t\thi\n\n\r\nx\r \n",
    "é e\u0301 ﬁ Å \u212b a\u0300\u0301\u0302",  # the same letters composed, combined, compatible
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽",
    "你好，世界。こんにちは 안녕하세요",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "1234567890 12 345,678.90 ٣٤٥ ½",
    "a" * 300 + " " + "é" * 100,
    "x\x00\x01\x1f\x7f\u200b\ufeff\ufffd",
    "▁▁x ▁ <0x0A> Ġ",
    "don't DON'T I'll we'Ve 'ſ",
    "\u3000\u00a0 y \u2028z",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "def f(x):\n    return {'a': [1, 2]}\n\n\n",
]


def _random_text(rng: random.Random) -> str:
    ranges = [(32, 127), (32, 127), (0xA0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    words = [" ", "\n", "  ", "\t", "the", "ing", " and", "'s", "123", "Über", "\r\n"]
    parts = [
        rng.choice(words) if rng.random() < 0.4 else chr(rng.randrange(*rng.choice(ranges)))
        for _ in range(rng.choice([1, 3, 10, 60]))
    ]
    return "".join(parts)


FUZZ = [_random_text(random.Random(number)) for number in range(150)]
TEXTS = HARD + FUZZ
SENTENCEPIECE = [
    "tokenizers/llama2/tokenizer.model",
    "tokenizers/mistral/tokenizer.model.v1",
    "tokenizers/mistral/tokenizer.model.v3",
    "models/stories260K/tokenizer.model",
]
KNOWN = [  # of "Hello world"
    ("tokenizers/llama2", [1, 15043, 3186]),
    ("tokenizers/llama3", [128000, 9906, 1917]),
    ("tokenizers/qwen2.5", [9707, 1879]),
    ("tokenizers/gpt2", [15496, 995]),
    ("tokenizers/gpt2/gpt2.tiktoken", [15496, 995]),
    ("tokenizers/mistral/tokenizer.model.v1", [1, 22557, 1526]),
    ("tokenizers/mistral/tokenizer.model.v3", [1, 23325, 2294]),
]


@pytest.fixture(scope="module")
def load(assets):
    loaded = {}

    def cached(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(assets / name)
        return loaded[name]

    return cached


def _streamed(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return "".join([decoder.add(number) for number in ids]) + decoder.finish()


# The same ids as the original libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, ids", KNOWN)
def test_known_ids(load, name, ids):
    assert load(name).encode("Hello world") == ids


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_same_ids_as_sentencepiece(assets, load, name):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(assets / name)), load(name)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, ascii(text)
        assert ours.encode(text) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids) == _streamed(ours, ids), ascii(text)


AS_IS = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
TRAINED_HERE = {
    "llama": dict(model_type="bpe", vocab_size=330, byte_fallback=True, **AS_IS),
    "gemma": dict(
        **dict(model_type="bpe", vocab_size=330, byte_fallback=True, add_dummy_prefix=False, **AS_IS),
        **dict(user_defined_symbols=["\n\n", "▁▁", "▁▁▁", "<table>", "ing"], pad_id=0, eos_id=1, bos_id=2, unk_id=3),
    ),
    "user-defined": dict(
        model_type="bpe", vocab_size=330, byte_fallback=True, user_defined_symbols=["▁▁", "  ", "é", "▁the"], **AS_IS
    ),
    "control": dict(
        model_type="bpe", vocab_size=330, byte_fallback=True, control_symbols=["[INST]", "[/INST]"], **AS_IS
    ),
    "no-bytes": dict(model_type="bpe", vocab_size=75, split_digits=True, **AS_IS),
    "unigram": dict(model_type="unigram", vocab_size=45, normalization_rule_name="nmt_nfkc"),  # as T5's
}


@pytest.mark.parametrize("options", TRAINED_HERE.values(), ids=TRAINED_HERE.keys())
def test_same_ids_as_a_sentencepiece_model_trained_here(tmp_path, options):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = [
        f"{word} and {word}ing the {number}  times\tdon't\n\n über {word}s"
        for number, word in enumerate("walk talk sing read play".split() * 20)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "small"), minloglevel=2, **options
    )
    path = tmp_path / "small.model"
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    samples = [text for text in TEXTS if options["model_type"] == "bpe" or text.isascii()] + corpus[:5]
    for text in samples:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), ascii(text)
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert ours.vocab_size == theirs.vocab_size()


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("tokenizers/llama3/tokenizer.model", tokenizer_files.LLAMA3_PATTERN),
        ("tokenizers/gpt2/gpt2.tiktoken", tokenizer_files.GPT2_PATTERN),
    ],
)
def test_same_ids_as_tiktoken(assets, load, name, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(assets / name))
    theirs, ours = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), load(name)
    for text in TEXTS:
        ids = theirs.encode(text, disallowed_special=())
        assert ours.encode(text, add_special_tokens=False) == ids, ascii(text)
        assert ours.decode(ids) == text == _streamed(ours, ids)


def _as_hf_folder(assets, name, folder):
    """A folder that transformers reads: the gpt2 files don't say of what kind they are."""
    shutil.copytree(assets / name, folder)
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return folder


@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/gpt2", "models/stories260K"])
def test_same_ids_as_transformers(assets, tmp_path, name):
    from transformers import AutoTokenizer

    folder = _as_hf_folder(assets, name, tmp_path / "model")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    specials = [token.content for token in ours.backend.get_added_tokens_decoder().values()]
    inside = [f"a{token} b {token}{token}\n{token}c" for token in specials]
    for text in [*HARD, *FUZZ[:60], *inside]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, ascii(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.encode_batch(HARD) == [ours.encode(text) for text in HARD]


# Decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in KNOWN] + ["models/stories260K"])
def test_streamed_text_is_the_whole_text(load, name):
    tokenizer = load(name)
    rng = random.Random(0)
    for text in HARD:
        ids = tokenizer.encode(text)
        assert _streamed(tokenizer, ids) == tokenizer.decode(ids), ascii(text)
    for _ in range(100):  # ids as an untrained model gives them: cut characters, stray bytes, special tokens
        ids = [rng.randrange(min(tokenizer.vocab_size, rng.choice([300, 10**6]))) for _ in range(20)]
        if tokenizer.token_to_id("<0x0A>") is None or "\ufffd" not in tokenizer.decode(ids):
            assert _streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_stream_never_gives_a_half_character(load):
    tokenizer = load("tokenizers/llama3")
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.add(number) for number in tokenizer.encode("𝔘𝔫ï 👨‍👩‍👧", add_special_tokens=False)]
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)
    assert isinstance(decoder, StreamDecoder)


def test_bytes_that_are_no_utf8_are_replaced(load):
    tokenizer = load("tokenizers/llama3")
    half = tokenizer.encode("𝔘", add_special_tokens=False)[:1]
    assert tokenizer.decode([*half, *tokenizer.encode("a", add_special_tokens=False)]) == "\ufffda"
    assert _streamed(tokenizer, half) == "\ufffd"


# Special tokens ----------------------------------------------------------------------------------------------------


def test_special_ids(load):
    llama3, qwen, stories = load("tokenizers/llama3"), load("tokenizers/qwen2.5"), load("models/stories260K")
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id, llama3.vocab_size) == (128000, 128001, 128001, 128256)
    assert llama3.encode("<|eot_id|><|python_tag|><|eom_id|>", add_special_tokens=False) == [128009, 128010, 128008]
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id, qwen.vocab_size) == (None, 151645, 151643, 151665)
    assert qwen.stop_ids == {151645}
    assert (stories.bos_id, stories.eos_id, stories.unk_id, stories.pad_id) == (1, 2, 0, 0)
    assert stories.stop_ids == {1, 2}  # both stand in its generation_config.json
    assert qwen.decode([151644, 9707, 151645]) == "Hello"


def test_stop_ids_have_the_templates_end_of_turn(assets):
    tokenizer = load_tokenizer(assets / "tokenizers/qwen2.5", chat_template="qwen3")
    tokenizer.eos_id = 151643  # as base models have it
    assert tokenizer.stop_ids == {151643, 151645}
    tokenizer = load_tokenizer(assets / "models/stories260K", chat_template="chatml")
    assert tokenizer.stop_ids == {1, 2}  # <|im_end|> is no token there
    tokenizer = load_tokenizer(
        assets / "models/stories260K", chat_template="chatml", add_tokens=["<|im_start|>", "<|im_end|>"]
    )
    assert tokenizer.stop_ids == {1, 2, 513} and tokenizer.vocab_size == 514


def test_added_tokens(assets):
    tokenizer = load_tokenizer(assets / "models/stories260K")
    before = tokenizer.fingerprint
    assert tokenizer.add_tokens(["<a>", "<a>", "<s>", "<b>"]) == 2
    assert tokenizer.vocab_size == 514 and tokenizer.fingerprint != before
    assert tokenizer.encode("<b><a>", add_special_tokens=False) == [513, 512]
    assert tokenizer.decode([513, 403, 512]) == "Once" and {512, 513} <= tokenizer.special_ids


def test_config_decides_on_bos_and_eos(assets, tmp_path):
    shutil.copy(assets / "models/stories260K/tokenizer.json", tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("Once")[-1] == 2 and load_tokenizer(tmp_path).encode("Once")[0] != 1


def test_bare_tokenizer_json_takes_special_tokens_from_the_models_config(assets, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(assets / "models/stories260K" / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


# Files -------------------------------------------------------------------------------------------------------------


SAVED = [(name, ()) for name, _ in KNOWN if "gpt2" not in name and not name.endswith("v1")] + [
    ("tokenizers/gpt2", ("<think>", "<new token>")),
    ("models/stories260K", ()),
    ("models/stories260K", ("<think>", "<new token>")),
]


@pytest.mark.parametrize("name, added", SAVED)
def test_saved_tokenizer_is_the_same_here_and_in_transformers(assets, tmp_path, name, added):
    from transformers import AutoTokenizer

    ours = load_tokenizer(assets / name, chat_template="chatml", add_tokens=added)
    ours.save(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    chat = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Hé!\n"}]
    assert again.encode_chat(chat) == ours.encode_chat(chat)
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.render_chat(chat)
    assert theirs.apply_chat_template(chat)["input_ids"] == ours.encode_chat(chat)[0]
    for text in [*HARD, *FUZZ[:30], f"a{'b'.join(added)} c", "x </s> <|im_end|>y"]:
        assert ours.encode(text) == again.encode(text) == theirs.encode(text), ascii(text)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_save_copies_what_did_not_change(assets, tmp_path):
    source = assets / "models/stories260K"
    written = load_tokenizer(source).save(tmp_path)
    assert {path.name for path in written} == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == json.loads(
        (source / "tokenizer_config.json").read_text()
    )


def test_fingerprint_is_stable_and_knows_the_template(assets):
    source = assets / "models/stories260K"
    assert load_tokenizer(source).fingerprint == load_tokenizer(source).fingerprint
    others = [load_tokenizer(source, chat_template="chatml"), load_tokenizer(source, chat_template_args={"a": 1})]
    assert len({load_tokenizer(source).fingerprint, *(other.fingerprint for other in others)}) == 3


def test_importing_the_tokenizer_imports_no_torch():
    import subprocess
    import sys

    check = "import sys, tunesmith.data.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# Mistakes ----------------------------------------------------------------------------------------------------------


def _message(path, **options):
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, **options)
    return str(caught.value).replace(str(path), "PATH")


def test_folder_without_a_tokenizer(tmp_path):
    assert _message(tmp_path) == (
        "PATH holds no tokenizer: there must be tokenizer.json, vocab.json with merges.txt, or a .model or .tiktoken file"
    )


def test_broken_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    assert _message(tmp_path).startswith("PATH/tokenizer.json can't be read as a tokenizer: ")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert (
        _message(tmp_path)
        == "PATH/tokenizer.model is neither a sentencepiece model nor a list of tiktoken ranks; download it again"
    )
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== x\n")
    assert _message(tmp_path) == "PATH/tokenizer.model:2 is no line of tiktoken ranks; download the file again"
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert _message(tmp_path) == (
        "PATH/tokenizer.model holds 2 tiktoken ranks; known are Llama 3's 128000 and GPT-2's 50256: use a folder with tokenizer.json"
    )
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nc\n")
    assert _message(tmp_path) == "PATH/merges.txt:3 must hold two tokens with a space between; download it again"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert _message(tmp_path) == "PATH/tokenizer_config.json must hold a JSON object; download it again"


ODD = [
    5,
    0,
    True,
    1.5,
    "x",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
    {"content": 5},
    {"5": "x"},
    [{"name": "x"}],
    [{"name": 1, "template": 2}],
]


def test_odd_values_in_the_files_are_told(tmp_path):
    """Whatever stands in the JSON files beside tokenizer.json, it is read or told in one sentence that names its file."""
    backend = Backend(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    keys = ["bos_token", "eos_token", "chat_template", "added_tokens_decoder", "additional_special_tokens"]
    keys += ["extra_special_tokens", "add_bos_token", "tokenizer_class", "legacy"]
    places = [("tokenizer_config.json", key) for key in keys]
    places += [
        ("special_tokens_map.json", "bos_token"),
        ("added_tokens.json", "new"),
        ("chat_template.json", "chat_template"),
    ]
    places += [
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("config.json", "text_config"),
    ]
    refused = set()
    for file, key in places:
        for value in ODD:
            (tmp_path / file).write_text(json.dumps({key: value}))
            try:
                assert load_tokenizer(tmp_path).vocab_size >= 3
            except UserError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), (file, key, value)
                refused.add((file, key))
        (tmp_path / file).unlink()
    assert {("tokenizer_config.json", "bos_token"), ("tokenizer_config.json", "chat_template")} <= refused
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 5, "chat_template": 7}')
    assert _message(tmp_path) == (
        "PATH/tokenizer_config.json: `bos_token` is 5, and must be text; mend the file or download it again"
    )


def test_several_models_in_a_folder(assets):
    assert _message(assets / "tokenizers/mistral") == (
        "PATH holds several tokenizers (tokenizer.model.v1, tokenizer.model.v3): name one of the files"
    )


def test_truncated_sentencepiece_model(assets, tmp_path):
    whole = (assets / "tokenizers/llama2/tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    assert "neither a sentencepiece model" in _message(tmp_path)


def test_added_token_with_an_impossible_id(assets, tmp_path):
    shutil.copy(assets / "models/stories260K/tokenizer.json", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 600}')
    assert _message(tmp_path) == "PATH gives the added token '<x>' the id 600, but it can only get 512"


def test_no_chat_template(assets):
    with pytest.raises(
        UserError, match="has no chat template: name a built-in one or a file in tokenizer.chat_template"
    ):
        load_tokenizer(assets / "tokenizers/llama2").render_chat([{"role": "user", "content": "Hi"}])


def test_parse_sentencepiece(assets):
    spec = sentencepiece_files.parse_sentencepiece(assets / "tokenizers/llama2/tokenizer.model")
    assert len(spec.pieces) == 32000 and spec.is_bpe and spec.byte_fallback and spec.add_dummy_prefix
    assert not spec.remove_extra_whitespaces and spec.ids == {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
