"""Tokenizer files read into a `tokenizers` backend: tokenizer.json, vocab.json with merges.txt, tiktoken ranks."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tunesmith.errors import UserError

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN_PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3_PATTERN = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


@dataclass
class Loaded:
    """What files gave: a backend that encodes, and the names of its special tokens."""

    backend: Backend
    tokens: dict[str, str] = field(default_factory=dict)
    """{"bos_token": text, …} as far as the files themselves say."""
    add_bos: bool | None = None
    """Whether encode() begins with the bos token; None: as the backend's own post-processor does it."""


# Files of the `tokenizers` library ---------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> Loaded:
    """A tokenizer.json, taken as it is, but for truncation and padding that somebody left in it."""
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything wrong in the file
        if path.is_file() and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the tokenizer itself; run `git lfs pull`") from error
        raise UserError(f"{path} can't be read as a tokenizer: {error}; download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return Loaded(backend)


def read_vocab_and_merges(vocab: Path, merges: Path, kind: str) -> Loaded:
    """GPT-2's two files: vocab.json and merges.txt. `kind` (a tokenizer class or model type) chooses the word pattern."""
    backend = Backend(models.BPE(vocab=_read_vocab(vocab), merges=_read_merges(merges)))
    backend.decoder = decoders.ByteLevel()
    if kind.lower().startswith("qwen"):
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = byte_level_words(QWEN_PATTERN)
        tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    return Loaded(backend, tokens, add_bos=False)


def byte_level_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut text into words by a pattern, then write each byte as one printable character."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}); download it again") from error
    if not isinstance(vocab, dict):
        raise UserError(f"{path} must hold an object of token: id; download it again")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right:
            raise UserError(f"{path}:{number} must hold two tokens with a space between; download it again")
        pairs.append((left, right))
    return pairs


# tiktoken: a list of byte strings with ranks -----------------------------------------------------------------------


def is_tiktoken(path: Path) -> bool:
    """Whether the file is a list of ranks (lines of base64 and a number) rather than a sentencepiece model."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1024)) is not None


def read_tiktoken(path: Path) -> Loaded:
    """A file of tiktoken ranks; the word pattern and the special tokens, which it does not hold, follow from its size."""
    vocab = _read_ranks(path)
    if len(vocab) == 128_000:
        pattern, specials = LLAMA3_PATTERN, llama3_special_tokens()
        tokens, add_bos = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, True
    elif len(vocab) == 50_256:
        pattern, specials = GPT2_PATTERN, ["<|endoftext|>"]
        tokens, add_bos = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}, False
    else:
        raise UserError(
            f"{path} holds {len(vocab)} tiktoken ranks; known are Llama 3's 128000 and GPT-2's 50256: "
            "use a folder with tokenizer.json"
        )
    merges = merges_of(vocab, list(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = byte_level_words(pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return Loaded(backend, tokens, add_bos)


def _read_ranks(path: Path) -> dict[str, int]:
    letters = byte_letters()
    vocab = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line:
            try:
                word, rank = line.split()
                vocab["".join(letters[byte] for byte in base64.b64decode(word))] = int(rank)
            except ValueError as error:
                raise UserError(f"{path}:{number} is no line of tiktoken ranks; download the file again") from error
    return vocab


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens that follow Llama 3's ranks, under the names of Llama 3.1 and later (3.0 has the same ids in use)."""
    first = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    ]  # fmt: skip
    return first + [f"<|reserved_special_token_{number}|>" for number in range(3, 248)]


def merges_of(vocab: dict[str, int], ordered: list[str]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, in the order in which the third ones are `ordered` (best first).

    Rank files and sentencepiece models name tokens, not merges: any neighbours that form a token may merge.
    """
    merges: list[tuple[str, str]] = []
    for piece in ordered:
        pairs = [
            (left, right)
            for cut in range(1, len(piece))
            if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab
        ]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += pairs
    return merges


def wrap_with(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Let encode() put these tokens around text, and nothing else."""
    around = f"{bos + ':0 ' if bos else ''}$A:0{' ' + eos + ':0' if eos else ''}"
    pair = f"{around}{' ' + bos + ':1' if bos else ''} $B:1{' ' + eos + ':1' if eos else ''}"
    tokens = [(text, backend.token_to_id(text)) for text in dict.fromkeys((bos, eos)) if text]
    backend.post_processor = processors.TemplateProcessing(single=around, pair=pair, special_tokens=tokens)
