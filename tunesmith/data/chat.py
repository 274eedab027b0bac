"""Chat templates: conversations checked and rendered as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from tunesmith.data import chat_spans
from tunesmith.data.chat_frame import Frame, frame_of
from tunesmith.data.chat_sandbox import sandbox
from tunesmith.data.chat_sentinels import BadConversation, is_empty
from tunesmith.data.chat_spans import Span
from tunesmith.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which data sets keep what an assistant thought; templates read the first, gpt-oss's the second."""
TEMPLATES = Path(__file__).parent / "templates"


class ChatTemplate:
    """One compiled template of one tokenizer."""

    def __init__(
        self,
        source: str,
        name: str,
        tokens: Mapping[str, str],
        added_tokens: Iterable[str] = (),
        ends: Iterable[str] = (),
    ):
        """`tokens`: {"bos_token": text, …} for the template; `added_tokens`: tokens cut out of text; `ends`: those that end an answer."""
        self.source = source
        self.name = name
        self.tokens = dict(tokens)
        self.added_tokens = frozenset(added_tokens)
        self.ends = frozenset(ends)
        self.environment = sandbox()
        try:
            self.compiled = self.environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name} is no valid jinja: line {error.lineno}: {error.message}") from error
        tree = self.environment.parse(source)
        self.has_marks = any(True for _ in tree.find_all(jinja2.nodes.ExtensionAttribute))
        captures = (jinja2.nodes.Macro, jinja2.nodes.AssignBlock, jinja2.nodes.FilterBlock)
        inside = (found for node in tree.find_all(captures) for found in node.find_all(jinja2.nodes.ExtensionAttribute))
        self.marks_may_move = "endcall" in source or any(True for _ in inside)
        """Whether generation blocks stand inside of what the template changes afterwards."""
        self.takes_parts = any(word in source for word in ("is string", "is iterable", "is sequence", "is mapping"))
        self.takes_text_arguments = "arguments is string" in source
        self.knows_developer = "developer" in source
        self.probes: dict[str, Frame] = {}

    def render(
        self,
        messages: list[Message],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        args: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. Raises BadConversation if the messages are no conversation or the template refuses them."""
        return self.render_prepared(self.prepare(messages), tools, add_generation_prompt, args)

    def prepare(self, messages: list[Message]) -> list[Message]:
        """The messages checked, and as templates expect them: plain data, one name for reasoning, tool arguments as objects."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise BadConversation("a conversation must be a list of at least one message", None, "no messages")
        return [self._prepare_one(index, message) for index, message in enumerate(messages)]

    def _prepare_one(self, index: int, message: Message) -> Message:
        if not isinstance(message, Mapping):
            raise BadConversation(
                f"message {index} must be an object with role and content, but is {message!r}", index, "no message"
            )
        ready = {
            key: plain(value) for key, value in message.items() if value is not None and key not in ("train", "weight")
        }
        role = ready.get("role")
        if role not in ROLES:
            raise BadConversation(
                f"message {index} has the role {role!r}; roles are {', '.join(ROLES)}", index, "bad role"
            )
        if role == "developer" and not self.knows_developer:
            ready["role"] = "system"
        reasoning = next((ready[key] for key in REASONING if key in ready), None)
        if reasoning is not None:
            ready = {"thinking": reasoning, **ready, "reasoning_content": reasoning}
        if "tool_calls" in ready and not self.takes_text_arguments:
            ready["tool_calls"] = [_with_arguments(call) for call in ready["tool_calls"]]
        if "content" in ready:
            ready["content"] = self._content(index, ready["content"])
        elif not ready.get("tool_calls") and reasoning is None:
            raise BadConversation(f"message {index} ({role}) has no content", index, "no content")
        return ready

    def _content(self, index: int, content: Any) -> Any:
        """Text, or a list of text parts, which are joined for templates that know only text."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            raise BadConversation(
                f"message {index}: content must be text or a list of parts, but is {content!r}", index, "bad content"
            )
        for part in content:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise BadConversation(
                    f"message {index} has a part of type {part.get('type')!r}; only text can be used", index, "not text"
                )
        return content if self.takes_parts else "".join(part["text"] for part in content)

    def render_prepared(
        self,
        messages: list[Message],
        tools: list[dict] | None,
        add_generation_prompt: bool,
        args: Mapping[str, Any] | None,
        marks: list | None = None,
    ) -> str:
        """render() of messages that prepare() made. With `marks` (a list) its {% generation %} blocks stand between OPEN and CLOSE."""
        values = {
            **self.tokens,
            **(args or {}),
            "messages": messages,
            "tools": tools,
            "documents": (args or {}).get("documents"),
        }
        values["add_generation_prompt"] = add_generation_prompt
        if marks is not None:
            values["_generation_marks"] = marks
        try:
            return self.compiled.render(values)
        except jinja2.TemplateError as error:
            said: Exception = error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            said = error  # the template's own operations on the data, such as adding text to nothing
        raise self._refusal(messages, tools, args, said) from said

    def _refusal(
        self, messages: list[Message], tools: list[dict] | None, args: Mapping[str, Any] | None, said: Exception
    ) -> Exception:
        """Name the message at which the template gives up: the first one after which it says the same as of the whole."""
        index = len(messages) - 1
        while index > 0 and self._says(messages[:index], tools, args) == str(said):
            index -= 1
        role = messages[index].get("role")
        return BadConversation(
            f"{self.name} refuses the conversation at message {index} ({role}): {said}",
            index,
            "refused by the template",
        )

    def _says(self, messages: list[Message], tools: list[dict] | None, args: Mapping[str, Any] | None) -> str | None:
        values = {
            **self.tokens,
            **(args or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": False,
        }
        try:
            self.compiled.render(values)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            return str(error)
        return None

    @property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant's answer for it to end there, such as <|im_end|>; "" if nothing."""
        frame = frame_of(self, {})
        return frame.end or frame.last_end

    def spans(
        self,
        messages: list[Message],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        train_on_input: bool = False,
        args: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """The rendered text and the stretches of it that are in the loss, in order. See chat_spans for how they are found."""
        ready = self.prepare(messages)
        wanted = [_trains(index, message, train_on_input) for index, message in enumerate(messages)]
        return chat_spans.find(self, ready, wanted, train_on_input, tools, add_generation_prompt, args or {})


def _trains(index: int, message: Message, train_on_input: bool) -> bool:
    """Whether a message is in the loss: its own `train` or `weight`, else by its role. Empty answers can't be."""
    flag = message.get("train")
    weight = message.get("weight")
    if flag is not None and not isinstance(flag, bool):
        raise BadConversation(f"message {index}: train must be true or false, not {flag!r}", index, "bad weight")
    if weight is not None and weight not in (0, 1):
        raise BadConversation(f"message {index}: weight must be 0 or 1, not {weight!r}", index, "bad weight")
    default = train_on_input or message.get("role") == "assistant"
    trains = flag if flag is not None else bool(weight) if weight is not None else default
    if trains and message.get("role") == "assistant" and is_empty(message):
        raise BadConversation(f"message {index} is an empty answer of the assistant", index, "empty answer")
    return trains


def _with_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object: OpenAI's format keeps them as JSON text, which templates would quote again."""
    function = call.get("function") if isinstance(call, dict) else None
    inner = function if isinstance(function, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        arguments = json.loads(inner["arguments"])
    except ValueError:
        return call  # no JSON: left to the template as the text it is
    if not isinstance(arguments, dict):
        return call
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if inner is not call and isinstance(function, dict) else inner


def plain(value: Any) -> Any:
    """JSON data as it is; of anything richer only its name, for templates must not get at methods."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, int, float)):
        return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))
    return f"<{type(value).__name__}>"


# Where templates come from -----------------------------------------------------------------------------------------


def built_in_names() -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def built_in_template(name: str) -> str:
    """Source of a built-in template; UserError that lists the names there are."""
    path = TEMPLATES / f"{name}.jinja"
    if name not in built_in_names():
        raise UserError(
            f"{name} is neither a file nor a built-in chat template; built in are {', '.join(built_in_names())}"
        )
    return read_template(path)


TEMPLATE_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|eot_id|>"),
    "llama3_1": ("<|start_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi3": ("<|user|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>"),
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
}
"""Tokens that a vocabulary must have for a built-in template to make sense; the others write plain text."""


def fitting_template(names: tuple[str, ...], has_token: Callable[[str], bool]) -> str | None:
    """The first of the built-in templates `names` whose special tokens the vocabulary has."""
    return next((name for name in names if all(map(has_token, TEMPLATE_TOKENS.get(name, ())))), None)


def read_template(path: Path) -> str:
    """Source of a template file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {path} can't be read: {error}") from error


def choose_template(templates: str | dict[str, str], with_tools: bool, name: str) -> str:
    """The source to use: of several named ones tool_use if there are tools, else default."""
    if isinstance(templates, str):
        return templates
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise UserError(
            f"{name} has templates named {', '.join(sorted(templates))} but no default: name a file in tokenizer.chat_template"
        )
    return templates["default"]
