"""A tokenizer as GGUF metadata: byte-level BPE with its merges, or sentencepiece's BPE with its scores."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokenizer_files import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN
from tunesmith.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[tuple[str, ...], str] = {
    (GPT2_PATTERN,): "gpt-2",
    (QWEN_PATTERN,): "qwen2",
    (LLAMA3_PATTERN, "whole words"): "llama-bpe",
    (LLAMA3_PATTERN,): "dbrx",
    (TEKKEN_PATTERN, "whole words"): "tekken",
    ("digits", GPT2_PATTERN): "smollm",
}
"""The patterns that cut text into words, and whether words of the vocabulary are taken whole before any merge -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF holds of a tokenizer."""

    model: str
    """llama: sentencepiece's BPE; gpt2: byte-level BPE."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    adds_bos: bool
    adds_eos: bool
    adds_space: bool


def read_vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The vocabulary of a model whose embedding has `rows` rows, ids that no token has included.

    Raises UserError for a kind of tokenizer that llama.cpp does not have, or more tokens than rows.
    """
    content = json.loads(tokenizer.backend.to_str())
    model, where = content["model"], f"the tokenizer of {tokenizer.source}"
    if model["type"] != "BPE":
        raise UserError(
            f"{where} is of the kind {model['type']}, which a GGUF file of this model can't hold: only BPE can be exported"
        )
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{where} has {tokenizer.vocab_size} tokens, but the model's embedding only {rows} rows: is this the model's tokenizer?"
        )
    is_byte_level = any(step["type"] == "ByteLevel" for step in _steps(content["pre_tokenizer"]))
    tokens, types = _tokens(tokenizer, rows, is_sentencepiece=not is_byte_level)
    bare, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    common: dict[str, Any] = dict(
        tokens=tokens,
        types=types,
        adds_bos=full[: len(full) - len(bare)][:1] == [tokenizer.bos_id] and tokenizer.bos_id is not None,
        adds_eos=full[-1:] == [tokenizer.eos_id] != bare[-1:],
    )
    if is_byte_level:
        pre = _word_rule(content, where)
        return Vocabulary(
            "gpt2", pre, scores=None, merges=[" ".join(pair) for pair in pairs], adds_space=False, **common
        )
    if not model.get("byte_fallback"):
        raise UserError(
            f"{where} is a BPE over characters without bytes to fall back on, which llama.cpp does not have"
        )
    adds_space = bool(bare) and (tokenizer.id_to_token(bare[0]) or "").startswith("▁")
    return Vocabulary("llama", "default", scores=_scores(tokens, pairs), merges=None, adds_space=adds_space, **common)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _word_rule(content: dict[str, Any], where: str) -> str:
    """llama.cpp's name for the way in which a byte-level BPE cuts words. Raises UserError where it has none."""
    rules: list[str] = []
    for step in _steps(content["pre_tokenizer"]):
        if step["type"] == "Split":
            rules.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif step["type"] == "Digits" and step["individual_digits"]:
            rules.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            rules += [GPT2_PATTERN] * step["use_regex"]
        else:
            rules.append(json.dumps(step))
    if content["model"].get("ignore_merges"):
        rules.append("whole words")
    if tuple(rules) not in WORDS:
        raise UserError(
            f"{where} cuts words by a rule that llama.cpp has no name for that we know: {' then '.join(rules)}"
        )
    return WORDS[tuple(rules)]


def _tokens(tokenizer: Tokenizer, rows: int, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of each id below `rows`."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for text, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[number], types[number] = text, NORMAL
        if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[number] = BYTE
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        # llama.cpp finds these in the text as it is, where spaces are not ▁ yet.
        tokens[number] = token.content if token.special else token.content.replace("▁", " ")
        types[number] = CONTROL if token.special else USER_DEFINED
    if is_sentencepiece and tokenizer.unk_id is not None:
        types[tokenizer.unk_id] = UNKNOWN
    if len(set(tokens)) < rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise UserError(
            f"the tokenizer of {tokenizer.source} has two tokens {twice!r}, which llama.cpp can't tell apart"
        )
    return tokens, types


def _scores(tokens: list[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Of the pieces that two neighbours could form, sentencepiece takes the one with the highest score: the one whose merge comes first."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(text, len(merges))) for text in tokens]


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Write it as metadata, special tokens and chat templates included."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.encode("utf-8", "surrogatepass") for token in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "eot": _end_of_turn(tokenizer)}
    if "pad_token" in tokenizer.tokens:
        ids["pad"] = tokenizer.pad_id
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.adds_space)
    templates = tokenizer.chat_templates
    if isinstance(templates, str):
        writer.add_chat_template(templates)
    elif templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """A second token that ends an answer, beside eos; None where there is none."""
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    return others[-1] if others else None
