"""sentencepiece models read into a `tokenizers` backend that gives the same ids; the sentencepiece library is not needed."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tunesmith.data.tokenizer_files import Loaded, merges_of
from tunesmith.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class SentencePieceModel:
    """The fields of a sentencepiece model file that decide how it encodes."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """(text, score, type) by id."""
    is_bpe: bool = False
    byte_fallback: bool = False
    charsmap: bytes = b""
    """Compiled normalization rules; empty: none."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})


def read_sentencepiece(path: Path, prefix: str | None = None) -> Loaded:
    """A sentencepiece model (BPE or unigram), with the ids that the sentencepiece library gives to text.

    `prefix` says where the space goes that these models put before text: "always" (before every stretch between special
    tokens, as the library does when it encodes stretch by stretch), "start" (before the whole text only), or "first" (as
    "start", but not where text begins with a space: what transformers does with "legacy": false). Default: "start" if
    the model has tokens for use inside of text (Mistral v3's [INST]), whose templates write that space themselves;
    "always" otherwise.
    """
    spec = parse_sentencepiece(path)
    vocab = {text: number for number, (text, _, _) in enumerate(spec.pieces)}
    unknown = spec.pieces[spec.ids["unk"]][0] if spec.ids["unk"] >= 0 else None
    if spec.is_bpe:
        usable = {text: vocab[text] for text, _, kind in spec.pieces if kind in (NORMAL, USER_DEFINED)}
        ordered = sorted(usable, key=lambda text: -spec.pieces[vocab[text]][1])
        merges = merges_of(usable, ordered)
        model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    else:
        scored = [(text, score) for text, score, _ in spec.pieces]
        model = models.Unigram(scored, unk_id=spec.ids["unk"], byte_fallback=spec.byte_fallback)
    backend = Backend(model)
    named = {name: spec.pieces[number][0] for name, number in spec.ids.items() if number >= 0}
    inner = [text for text, _, kind in spec.pieces if kind in (CONTROL, USER_DEFINED) and text not in named.values()]
    prefix = prefix or ("start" if inner else "always")
    _set_spaces(backend, spec, prefix)
    _add_pieces(backend, spec, prefix)
    return Loaded(backend, {f"{name}_token": text for name, text in named.items()}, add_bos="bos" in named)


def _set_spaces(backend: Backend, spec: SentencePieceModel, prefix: str) -> None:
    """Spaces become ▁ on the way in and spaces again on the way out; text gets one more in front, as the model says."""
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix and prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    elif spec.add_dummy_prefix and prefix == "start":
        # Special tokens are matched after this step, in the whole text. Text that begins with one gets no prefix, nor does
        # any token alone, for tokens go through this step, too.
        special, users = ("|".join(map(re.escape, texts)) for texts in _added(spec))
        alone = rf"|(?:{users})\z" if users else ""
        steps += [normalizers.Replace(Regex(rf"\A(?!{special}{alone})(?=[\s\S])"), "▁"), normalizers.Replace(" ", "▁")]
    elif spec.add_dummy_prefix:
        steps += [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    else:
        steps += [normalizers.Replace(" ", "▁")]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    if steps:
        backend.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.Sequence(undo)


def _add_pieces(backend: Backend, spec: SentencePieceModel, prefix: str) -> None:
    """Control pieces and the unknown one are special tokens; user-defined pieces are cut out of text before all else."""
    special, users = _added(spec)
    # Matched after spaces became ▁, for runs of spaces may be such pieces; but "always" would put a prefix into patterns.
    normalized = not spec.add_dummy_prefix or prefix == "start"
    within = spec.add_dummy_prefix and prefix == "start"
    backend.add_special_tokens([AddedToken(text, special=True, normalized=within) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=normalized) for text in users])


def _added(spec: SentencePieceModel) -> tuple[list[str], list[str]]:
    """(special tokens, user-defined ones); the library never finds a piece that holds a space, which is ▁ by then."""
    special = [text for text, _, kind in spec.pieces if kind in (CONTROL, UNKNOWN)]
    return special, [text for text, _, kind in spec.pieces if kind == USER_DEFINED and " " not in text]


def parse_sentencepiece(path: Path) -> SentencePieceModel:
    """Read sentencepiece_model.proto's ModelProto from its wire format; raises UserError for anything else."""
    model = SentencePieceModel()
    try:
        for number, value in _protobuf_fields(path.read_bytes()):
            if number == 1:
                piece = dict(_protobuf_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece.get(2, b"\0" * 4)))[0]
                model.pieces.append((_bytes(piece[1]).decode("utf-8"), score, int(piece.get(3, NORMAL))))
            elif number == 2:
                trainer = dict(_protobuf_fields(_bytes(value)))
                model.is_bpe = trainer.get(3, 1) == 2
                model.byte_fallback = bool(trainer.get(35, 0))
                for name, key in (("unk", 40), ("bos", 41), ("eos", 42), ("pad", 43)):
                    model.ids[name] = _signed(trainer[key]) if key in trainer else model.ids[name]
            elif number == 3:
                rules = dict(_protobuf_fields(_bytes(value)))
                model.charsmap = _bytes(rules.get(2, b""))
                model.add_dummy_prefix = bool(rules.get(3, 1))
                model.remove_extra_whitespaces = bool(rules.get(4, 1))
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is neither a sentencepiece model nor a list of tiktoken ranks; download it again"
        ) from error
    if not model.pieces:
        raise UserError(f"{path} holds no sentencepiece pieces; download it again")
    return model


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: an int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            if at + size > len(data):
                raise ValueError("a field goes beyond the end")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where bytes belong")
    return value


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes where a number belongs")
    return value - 2**64 if value >= 2**63 else value
