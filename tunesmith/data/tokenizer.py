"""The tokenizer: text to ids and back, special tokens, chats, and the files that keep it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tunesmith.configs.shared import TokenizerConfig
from tunesmith.data import tokenizer_folder
from tunesmith.data.chat import ChatTemplate, built_in_template, choose_template, fitting_template
from tunesmith.data.chat_spans import mask_of
from tunesmith.data.stream_decoder import StreamDecoder
from tunesmith.errors import UserError

Message = dict[str, Any]


class Tokenizer:
    """Text to ids and back, as the model's own tokenizer does it. Made by load_tokenizer()."""

    def __init__(
        self,
        backend: Backend,
        *,
        tokens: dict[str, str],
        config: dict[str, Any] | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
        chat_template_name: str = "the chat template",
        chat_template_args: dict[str, Any] | None = None,
        max_seq_len: int | None = None,
        source: Path | None = None,
    ):
        self.backend = backend
        self.tokens = tokens
        """{"bos_token": text, …}: the named special tokens there are."""
        self.config = config or {}
        self.max_seq_len = max_seq_len
        self.source = source
        """Folder or file it came from; its files are copied on save() as long as they still say the truth."""
        self.bos_id = self._id_of("bos_token")
        self.unk_id = self._id_of("unk_token")
        self.model_eos_ids = tuple(eos_ids)
        """Ids that end a text as the model's own files have it; transformers stops at them."""
        eos = self._id_of("eos_token")
        self.eos_id = eos if eos is not None else next(iter(self.model_eos_ids), None)
        pads = (self._id_of("pad_token"), self.eos_id, self.unk_id, 0)
        self.pad_id: int = next(number for number in pads if number is not None)
        self.chat_templates = chat_template
        self.chat_template_name = chat_template_name
        self.chat_template_args = chat_template_args or {}
        self._changed = False
        self._chats: dict[bool, ChatTemplate] = {}

    # Text ----------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with special tokens around it (mostly bos in front) if the model's tokenizer puts them there."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """encode() of many texts at once, in parallel unless TOKENIZERS_PARALLELISM=false."""
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one and gives text as soon as it is certain."""
        return StreamDecoder(lambda ids: self.decode(ids, skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """Id of one token by its text, or None."""
        return self.backend.token_to_id(token)

    def id_to_token(self, number: int) -> str | None:
        """The token's text as the vocabulary writes it, or None."""
        return self.backend.id_to_token(number)

    # Special tokens ------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included: rows that the embedding must have at least."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that decode(skip_special_tokens=True) leaves out."""
        return frozenset(n for n, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: eos, the model's other eos ids, and the chat template's end of turn."""
        ends = {self.eos_id, *self.model_eos_ids}
        if self.chat_templates is not None:
            last = self.backend.encode(self._chat(False).end_of_turn.strip(), add_special_tokens=False).ids[-1:]
            ends.update(number for number in last if number in self.backend.get_added_tokens_decoder())
        return frozenset(number for number in ends if number is not None)

    def add_tokens(self, tokens: Iterable[str], special: bool = True) -> int:
        """Add tokens that are not there yet, with new ids at the end; returns how many. The embedding must grow along."""
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        new = [text for text in dict.fromkeys(tokens) if text not in known]
        if "" in new:
            raise UserError("an added token must not be empty; take it out of add_tokens")
        added = [AddedToken(text, special=special, normalized=False) for text in new]
        count = self.backend.add_special_tokens(added) if special else self.backend.add_tokens(added)
        if new:
            self._changed = True
            self._forget()
        return count

    def _forget(self) -> None:
        for name in ("vocab_size", "special_ids", "stop_ids", "fingerprint", "derived"):
            self.__dict__.pop(name, None)
        self._chats.clear()

    def _id_of(self, name: str) -> int | None:
        text = self.tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    # Chats ---------------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The jinja source that chats without tools are rendered with, or None."""
        return (
            None
            if self.chat_templates is None
            else choose_template(self.chat_templates, False, self.chat_template_name)
        )

    def set_chat_template(self, source: str | dict[str, str], name: str = "the chat template") -> None:
        """Use another chat template (jinja source, or several by name) from now on."""
        self.chat_templates, self.chat_template_name = source, name
        self._forget()

    def render_chat(
        self,
        messages: list[Message],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **template_args: Any,
    ) -> str:
        """The conversation as text, as transformers' apply_chat_template(tokenize=False) renders it."""
        args = {**self.chat_template_args, **template_args}
        return self._chat(tools is not None).render(messages, tools, add_generation_prompt, args)

    def encode_prompt(
        self, messages: list[Message], tools: list[dict] | None = None, **template_args: Any
    ) -> list[int]:
        """Ids of a conversation up to where the assistant is to go on, for generation."""
        text = self.render_chat(messages, tools, add_generation_prompt=True, **template_args)
        return self.encode(text, add_special_tokens=False)

    def encode_chat(
        self,
        messages: list[Message],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        train_on_input: bool = False,
        **template_args: Any,
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether it is in the loss.

        In the loss are the assistant's turns: what it wrote (thinking and tool calls too, as rendered) and the end-of-turn
        token that it must learn to write; not the header before. `train_on_input` adds all the rest. A message's own
        `train: bool` or `weight: 0|1` goes before both. A token is in the loss as soon as one of its characters is.
        Text is tokenized once and whole; what the template does not write (bos, eos) is not added.
        Raises BadConversation, a UserError, naming the message.
        """
        args = {**self.chat_template_args, **template_args}
        chat = self._chat(tools is not None)
        text, spans = chat.spans(messages, tools, add_generation_prompt, train_on_input, args)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, mask_of(encoding.offsets, spans)

    def encode_chat_batch(
        self,
        conversations: Sequence[list[Message]],
        tools: Sequence[list[dict] | None] | None = None,
        train_on_input: bool = False,
        **template_args: Any,
    ) -> list[tuple[list[int], list[bool]] | UserError]:
        """encode_chat() of many conversations; one that can't be used gives its UserError instead of raising it."""
        args = {**self.chat_template_args, **template_args}
        results: list[Any] = []
        for index, messages in enumerate(conversations):
            of_row = tools[index] if tools is not None else None
            try:
                results.append(self._chat(of_row is not None).spans(messages, of_row, False, train_on_input, args))
            except UserError as error:
                results.append(error)
        texts = [item[0] for item in results if not isinstance(item, UserError)]
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
        return [item if isinstance(item, UserError) else _with_mask(next(encodings), item[1]) for item in results]

    def _chat(self, with_tools: bool) -> ChatTemplate:
        if with_tools not in self._chats:
            if self.chat_templates is None:
                raise UserError(
                    f"the tokenizer of {self.source} has no chat template: name a built-in one or a file in tokenizer.chat_template"
                )
            source = choose_template(self.chat_templates, with_tools, self.chat_template_name)
            specials = {token.content for token in self.backend.get_added_tokens_decoder().values()}
            ends = {
                self.backend.id_to_token(number) for number in (self.eos_id, *self.model_eos_ids) if number is not None
            }
            self._chats[with_tools] = ChatTemplate(
                source, self.chat_template_name, self.tokens, specials, filter(None, ends)
            )
        return self._chats[with_tools]

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What others have made from this tokenizer and keep as long as it does not change."""
        return {}

    # Files ---------------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides ids and masks: caches of tokenized rows are keyed by it."""
        parts = [self.backend.to_str(), self.chat_templates, self.chat_template_args, self.tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def save(self, folder: Path | str) -> list[Path]:
        """Write the files from which transformers and load_tokenizer() make this tokenizer again; returns their paths.

        The original files are copied where nothing changed; else tokenizer.json is written anew.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key not in ("chat_template", "auto_map")}
        written = self._copy_originals(folder) if not self._changed else []
        if (folder / "tokenizer.json") not in written:
            self.backend.save(str(folder / "tokenizer.json"))
            written.append(folder / "tokenizer.json")
            config = self._described(config)
        elif not config:
            config = self._described({})
        written += self._save_templates(folder)
        _write_json(folder / "tokenizer_config.json", config)
        return sorted({*written, folder / "tokenizer_config.json"})

    def _copy_originals(self, folder: Path) -> list[Path]:
        if self.source is None or not (self.source / "tokenizer.json").is_file():
            return []
        copied = []
        for name in (
            "tokenizer.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "tokenizer.model",
        ):
            if (self.source / name).is_file():
                if (self.source / name).resolve() != (folder / name).resolve():
                    shutil.copyfile(self.source / name, folder / name)
                copied.append(folder / name)
        return copied

    def _described(self, config: dict[str, Any]) -> dict[str, Any]:
        """tokenizer_config.json for a tokenizer.json that says everything: transformers takes it as it is."""
        said_by_json = (
            "added_tokens_decoder",
            "add_bos_token",
            "add_eos_token",
            "add_prefix_space",
            "legacy",
            "sp_model_kwargs",
        )
        kept = {key: value for key, value in config.items() if key not in said_by_json}
        limit = {} if self.max_seq_len is None else {"model_max_length": self.max_seq_len}
        fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {**limit, **kept, **fixed, **self.tokens}

    def _save_templates(self, folder: Path) -> list[Path]:
        if self.chat_templates is None:
            return []
        templates = self.chat_templates if isinstance(self.chat_templates, dict) else {"default": self.chat_templates}
        written = []
        for name, source in templates.items():
            path = (
                folder / "chat_template.jinja"
                if name == "default"
                else folder / "additional_chat_templates" / f"{name}.jinja"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8", newline="")
            written.append(path)
        return written


def _with_mask(encoding, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    return encoding.ids, mask_of(encoding.offsets, spans)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(
    path: Path | str,
    chat_template: str | None = None,
    max_seq_len: int | None = None,
    chat_template_args: dict[str, Any] | None = None,
    add_tokens: Sequence[str] = (),
) -> Tokenizer:
    """The tokenizer of a model folder, a Hub repository, or a single file (tokenizer.json, .model, .tiktoken).

    `chat_template` is a file of jinja or the name of a built-in template and goes before the model's own;
    `chat_template_args` are handed to it (such as {"enable_thinking": False}); `add_tokens` are new special tokens.
    Raises UserError if there is no tokenizer or a file is broken.
    """
    where = Path(path).expanduser()
    if not where.exists():
        from tunesmith import hub

        where = hub.resolve(str(path), "tokenizer", allow_patterns=hub.TOKENIZER_AND_SETTINGS)
    folder = where if where.is_dir() else where.parent
    config = tokenizer_folder.read_json(folder / "tokenizer_config.json")
    model = tokenizer_folder.read_json(folder / "config.json")
    loaded = tokenizer_folder.read_backend(
        where, config, str(config.get("tokenizer_class") or model.get("model_type") or "")
    )
    eos_ids = tokenizer_folder.model_eos_ids(folder, model)
    tokens = tokenizer_folder.named_tokens(folder, config, loaded, model, eos_ids)
    tokenizer_folder.add_listed_tokens(loaded.backend, folder, config, tokens)
    tokenizer_folder.set_wrapping(loaded, tokens, config)
    template, name = tokenizer_folder.find_template(folder, config, chat_template)
    tokenizer = Tokenizer(
        loaded.backend,
        tokens=tokens,
        config=config,
        eos_ids=eos_ids,
        chat_template=template,
        chat_template_name=name,
        chat_template_args=chat_template_args,
        max_seq_len=max_seq_len,
        source=where,
    )
    tokenizer.add_tokens(add_tokens)
    return tokenizer


def find_tokenizer(settings: TokenizerConfig, path: Path | str, chat_templates: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer that a config's `settings` name, else the one at `path`.

    Where neither settings nor repository have a chat template, the first of the built-in `chat_templates` (those of the
    model's family) whose special tokens the vocabulary has.
    """
    tokenizer = load_tokenizer(
        settings.path or path,
        chat_template=settings.chat_template,
        max_seq_len=settings.max_seq_len,
        chat_template_args=settings.chat_template_args,
        add_tokens=settings.add_tokens,
    )
    name = fitting_template(chat_templates, lambda token: tokenizer.token_to_id(token) is not None)
    if tokenizer.chat_template is None and name:
        tokenizer.set_chat_template(built_in_template(name), f"the built-in chat template {name}")
    return tokenizer
