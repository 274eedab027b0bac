"""What the files of a model folder say about its tokenizer: the backend, special tokens, the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tunesmith.data import sentencepiece_files, tokenizer_files
from tunesmith.data.chat import built_in_template, read_template
from tunesmith.errors import UserError
from tunesmith.hub import tokenizer_file
from tunesmith.models.config_json import checked

_CONFIG = "tokenizer_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_backend(where: Path, config: dict[str, Any], kind: str) -> tokenizer_files.Loaded:
    path = where if where.is_file() else tokenizer_file(where)
    if path.suffix == ".json" and path.name != "vocab.json":
        return tokenizer_files.read_tokenizer_json(path)
    if path.name == "vocab.json":
        return tokenizer_files.read_vocab_and_merges(path, path.with_name("merges.txt"), kind)
    if tokenizer_files.is_tiktoken(path):
        return tokenizer_files.read_tiktoken(path)
    legacy = config.get("legacy")
    return sentencepiece_files.read_sentencepiece(path, None if legacy is None else "always" if legacy else "first")


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object; download it again")
    return content


def _text(token: Any, what: str) -> str | None:
    """A token in a JSON file is its text or an object with its text under `content`; `what` it is stands in errors."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise _wrong(what, token, "text")
    return text


def _wrong(what: str, value: Any, words: str) -> UserError:
    return UserError(f"{what} is {value!r:.60}, and must be {words}; mend the file or download it again")


def named_tokens(
    folder: Path,
    config: dict[str, Any],
    loaded: tokenizer_files.Loaded,
    model: dict[str, Any],
    eos_ids: list[int],
) -> dict[str, str]:
    """{"bos_token": text, …} from the tokenizer's files (null there means none); without such files from the model's config."""
    told: dict[str, Any] = dict(loaded.tokens)
    special = read_json(folder / "special_tokens_map.json")
    for where, content in ((folder / "special_tokens_map.json", special), (folder / _CONFIG, config)):
        told |= {name: _text(content[name], f"{where}: `{name}`") for name in NAMED_TOKENS if name in content}
    if not told:
        numbers = {"bos_token": model.get("bos_token_id"), "eos_token": next(iter(eos_ids), None)}
        told = {name: loaded.backend.id_to_token(n) for name, n in numbers.items() if isinstance(n, int)}
    return {name: text for name, text in told.items() if text is not None}


def model_eos_ids(folder: Path, model: dict[str, Any]) -> list[int]:
    inner = model.get("text_config")
    own = folder / "generation_config.json"
    for where, content in ((own, read_json(own)), (folder / "config.json", model), (folder / "config.json", inner)):
        found = content.get("eos_token_id") if isinstance(content, dict) else None
        if found is not None:
            checked("eos_token_id", found, str(where))
            return list(found) if isinstance(found, list) else [found]
    return []


def add_listed_tokens(backend: Backend, folder: Path, config: dict[str, Any], tokens: dict[str, str]) -> None:
    """Tokens beyond the vocabulary file, under the ids that tokenizer_config.json or added_tokens.json give them."""
    listed: dict[int, AddedToken] = {}
    for text, number in read_json(folder / "added_tokens.json").items():
        if not isinstance(number, int):
            raise _wrong(f"{folder / 'added_tokens.json'}: `{text}`", number, "an id")
        listed[number] = AddedToken(text, normalized=False, special=True)
    described = config.get("added_tokens_decoder") or {}
    try:
        for number, spec in described.items():
            listed[int(number)] = AddedToken(**{key: value for key, value in spec.items() if key != "__type"})
    except (TypeError, ValueError, AttributeError):
        what = f"{folder / _CONFIG}: `added_tokens_decoder`"
        raise _wrong(what, described, "an object of id: description of a token") from None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(listed.items()):
        if token.content not in known:
            _add_one(backend, token)
            if backend.token_to_id(token.content) != number:
                found = backend.token_to_id(token.content)
                raise UserError(
                    f"{folder} gives the added token {token.content!r} the id {number}, but it can only get {found}"
                )
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise _wrong(f"{folder / _CONFIG}: `additional_special_tokens`", extra, "a list of tokens")
    extra = [_text(token, f"{folder / _CONFIG}: an additional special token") for token in extra]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys([*tokens.values(), *extra]):
        if text and text not in known:
            _add_one(backend, AddedToken(text, normalized=False, special=True))


def _add_one(backend: Backend, token: AddedToken) -> None:
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def set_wrapping(loaded: tokenizer_files.Loaded, tokens: dict[str, str], config: dict[str, Any]) -> None:
    """bos and eos around text: as tokenizer_config.json says; else as the kind of file does it; else as tokenizer.json does."""
    if "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = config.get("add_bos_token"), config.get("add_eos_token")
    elif loaded.add_bos is not None:
        bos, eos = loaded.add_bos, False
    else:
        return
    tokenizer_files.wrap_with(
        loaded.backend, tokens.get("bos_token") if bos else None, tokens.get("eos_token") if eos else None
    )


def find_template(folder: Path, config: dict[str, Any], chosen: str | None) -> tuple[str | dict[str, str] | None, str]:
    """(source or sources by name, what to call it in messages): the chosen one, else the model's own."""
    if chosen is not None:
        if Path(chosen).is_file():
            return read_template(Path(chosen)), chosen
        return built_in_template(chosen), f"the built-in chat template {chosen}"
    file = folder / "chat_template.jinja"
    templates: dict[str, str] = {}
    own, where = config.get("chat_template"), folder / _CONFIG
    if not own:
        where = folder / "chat_template.json"
        own = read_json(where).get("chat_template")
    if own:
        templates = _by_name(own, where)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_template(path)
    if file.is_file():
        templates["default"] = read_template(file)
    name = str(file) if file.is_file() else f"the chat template of {folder}"
    if not templates:
        return None, name
    return (templates["default"] if set(templates) == {"default"} else templates), name


def _by_name(templates: Any, where: Path) -> dict[str, str]:
    """{name: source} of one template, or of a list of them."""
    if isinstance(templates, str):
        return {"default": templates}
    try:
        named: dict[Any, Any] = {item["name"]: item["template"] for item in templates}
    except (TypeError, KeyError):
        named = {None: None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise _wrong(f"{where}: `chat_template`", templates, "text or a list of objects with name and template")
    return named
