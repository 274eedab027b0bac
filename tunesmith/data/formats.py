"""From a row of a data set to a conversation or a text: the formats we know, and what is wrong with a row that fits none. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from tunesmith.errors import UserError

Row = Mapping[str, Any]
Message = dict[str, Any]
Example = dict[str, Any]
"""{"messages": [...], "tools": [...] or None}, or {"text": "..."}; of preference data see preference_formats."""

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_WORDS = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""What data sets call a role, and its name in a chat template."""


class BadRow(Exception):
    """A row that can't be trained on. `reason` is the same for all rows with the same fault; `detail` says what this one holds."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are to be read."""

    format: str | None = None
    column_map: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    prompt_template: str | None = None
    """Text around a prompt, with {prompt} in it."""


@dataclass(frozen=True)
class Format:
    columns: tuple[str, ...]
    """Columns that every row needs."""
    optional: tuple[str, ...]
    read: Callable[[Row, Reading], Example]
    others: tuple[tuple[str, ...], ...] = ()
    """Other columns that do instead."""

    def fits(self, row: Row) -> bool:
        return any(all(column in row for column in columns) for columns in (self.columns, *self.others))


def read_row(row: Row, reading: Reading, format: Format) -> Example:
    """`row` as an example; raises BadRow where it can't be trained on."""
    example = format.read(_renamed(row, reading.column_map), reading)
    for text in _strings(example):
        if not text.isascii():  # told in no time
            _check_unicode(text)
    return example


def choose_format(row: Row, reading: Reading, place: str, allowed: Mapping[str, Format]) -> str:
    """The format of a source, judged by its first row: the one that was asked for, else the one its columns fit.

    Raises UserError that names the columns there are and those that are missing.
    """
    for ours, theirs in reading.column_map.items():
        if theirs not in row:
            raise UserError(
                f"{place}: `column_map` takes `{ours}` from a column `{theirs}`, which is not there; the columns are {listed(row)}{_meant(theirs, row)}"
            )
    row = _renamed(row, reading.column_map)
    if reading.format is None:
        for name, format in allowed.items():
            if format.fits(row):
                return name
        formats = ", ".join(_described(name, format) for name, format in allowed.items())
        raise UserError(
            f"{place}: no known format fits the columns {listed(row)}; {_suggestion(row, allowed)}"
            f"the formats and their columns: {formats}"
        )
    format = allowed[reading.format]
    for column in () if format.fits(row) else format.columns:
        if column not in row:
            raise UserError(
                f"{place}: no column `{column}`, which the format {_described(reading.format, format)} needs; the columns are {listed(row)}: "
                f"name yours with `column_map: {{{column}: your column}}`, or choose another `format`"
            )
    return reading.format


# --- one function per format ---------------------------------------------------------------------


def read_messages(row: Row, reading: Reading) -> Example:
    """OpenAI's: messages of role and content, tool_calls, weight or train; tools in a column of its own."""
    turns = turns_of(row, "messages", "role", "content")
    return _conversation(turns, row, reading, "messages")


def read_sharegpt(row: Row, reading: Reading) -> Example:
    """ShareGPT's: conversations of from and value; function_call and observation are a call and its result."""
    turns = decoded(row["conversations"], "conversations")
    own_words = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "from" in turns[0]
    names = ("from", "value") if own_words or not turns else ("role", "content")
    return _conversation(turns_of(row, "conversations", *names), row, reading, "conversations")


def read_alpaca(row: Row, reading: Reading) -> Example:
    """Alpaca's: instruction, input (may be empty) and output; system and history where there are such columns."""
    turns: list[Message] = []
    history = decoded(row.get("history") or [], "history")
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("column `history` is not a list of pairs")
        turns += [
            {"role": role, "content": text_of(said, "history")} for role, said in zip(("user", "assistant"), pair)
        ]
    turns.append({"role": "user", "content": instruction_of(row, reading)})
    turns.append({"role": "assistant", "content": text_of(row["output"], "output")})
    return _conversation(turns, row, reading, "output")


def instruction_of(row: Row, reading: Reading) -> str:
    """Alpaca's prompt: the instruction, and the input behind it."""
    parts = [text_of(row["instruction"], "instruction"), text_of(row.get("input") or "", "input")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise BadRow("empty prompt")
    return framed(prompt, reading)


def read_prompt_completion(row: Row, reading: Reading) -> Example:
    """A prompt and its completion, each a string or a list of messages; only the completion is trained."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        raise BadRow("empty prompt")
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": framed(prompt, reading)}]
    else:
        turns = turns_of(row, "prompt", "role", "content")
        turns = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    if isinstance(row["completion"], str):
        turns.append({"role": "assistant", "content": row["completion"]})
    else:
        turns += turns_of(row, "completion", "role", "content")
    return _conversation(turns, row, reading, "completion")


def read_text(row: Row, reading: Reading) -> Example:
    """Plain text, all of it trained."""
    text = text_of(row["text"], "text")
    if not text.strip():
        raise BadRow("empty text")
    return {"text": text}


FORMATS = {
    "messages": Format(("messages",), ("tools",), read_messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), read_sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), read_alpaca),
    "prompt_completion": Format(("prompt", "completion"), ("system", "tools"), read_prompt_completion),
    "text": Format(("text",), (), read_text),
}
"""Of conversations and texts; tried in this order when no format is given."""


# --- messages ------------------------------------------------------------------------------------


def turns_of(row: Row, column: str, role_key: str, content_key: str) -> list[Message]:
    """The messages in `column` with our names for roles; function calls become tool_calls."""
    turns = decoded(row[column], column)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"column `{column}` is not a list of messages", f"it is {shown(row[column])}")
    return [_message(turn, number, role_key, content_key) for number, turn in enumerate(turns, 1)]


def _message(turn: Mapping[str, Any], number: int, role_key: str, content_key: str) -> Message:
    if role_key not in turn:
        raise BadRow(f"a message without `{role_key}`", f"message {number} has {listed(turn)}")
    role = ROLE_WORDS.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        raise BadRow(
            "a role that is not known",
            f"message {number} has {shown(turn[role_key])}; known are {listed(ROLE_WORDS)}",
        )
    message = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    content = turn.get(content_key)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, number), **message}
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"], number)
    else:
        message.pop("tool_calls", None)
    if content is None and (message.get("tool_calls") or (role == "assistant" and content_key not in turn)):
        content = ""
    return {"role": role, "content": _content(content, number), **message}


def _content(content: Any, number: int) -> str:
    """Text, also from OpenAI's list of text parts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        for part in content:
            if part.get("type", "text") != "text":
                raise BadRow("content that is not text", f"message {number} has a part of type {shown(part['type'])}")
            if not isinstance(part.get("text"), str):
                raise BadRow("content that is not text", f"message {number} has a part without text, {shown(part)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow("content that is not text", f"message {number} has {shown(content)}")
    return content


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form; arguments written as JSON text are decoded, as chat templates expect them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("a function call that is not JSON", f"message {number} has {shown(value)}") from None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("a function call without a name", f"message {number} has {shown(call)}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass  # a template prints text as it is
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _conversation(turns: list[Message], row: Row, reading: Reading, column: str) -> Example:
    """The example, once the conversation is known to hold something to learn."""
    turns = with_system(turns, row, reading)
    check_answers(turns, column)
    return {"messages": turns, "tools": tools_of(row.get("tools"))}


def with_system(turns: list[Message], row: Row, reading: Reading) -> list[Message]:
    """The conversation with the row's own system message or that of the options, where it has none."""
    if row.get("system") and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": text_of(row["system"], "system")}, *turns]
    if reading.system_prompt is not None and not any(turn["role"] in ("system", "developer") for turn in turns):
        turns = [{"role": "system", "content": reading.system_prompt}, *turns]
    return turns


def check_answers(turns: list[Message], column: str) -> None:
    """Raises BadRow unless the assistant says something, wherever it is to be learned."""
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise BadRow("no assistant message", f"column `{column}`")
    for turn in answers:
        said = (
            turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content") or turn.get("thinking")
        )
        if not said and turn.get("weight", 1) != 0 and turn.get("train", True):
            raise BadRow("empty answer", f"column `{column}`")


def tools_of(tools: Any) -> list[Any] | None:
    """Tool descriptions as a list in OpenAI's form, from a list or JSON text."""
    tools = decoded(tools, "tools") if tools else None
    if not tools:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("column `tools` is not a list of tools", f"it is {shown(tools)}")
    return [tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


# --- small things --------------------------------------------------------------------------------


def _renamed(row: Row, column_map: Mapping[str, str]) -> Row:
    if not column_map:
        return row
    missing = [theirs for theirs in column_map.values() if theirs not in row]
    if missing:
        raise BadRow(f"no column `{missing[0]}`")
    kept = {name: value for name, value in row.items() if name not in column_map.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in column_map.items()}}


def decoded(value: Any, column: str) -> Any:
    """A list or object, also one written as JSON text (as in CSV files)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadRow(f"column `{column}` is not JSON", f"it is {shown(value)}") from None


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _check_unicode(text: str) -> None:
    """JSON may write half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise BadRow("text that is not Unicode", f"it holds half a surrogate pair: {around!a}") from None


def text_of(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"column `{column}` is not text", f"it is {shown(value)}")
    return value


def framed(prompt: str, reading: Reading) -> str:
    return prompt if reading.prompt_template is None else reading.prompt_template.replace("{prompt}", prompt)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _described(name: str, format: Format) -> str:
    columns = ", or ".join(" ".join(columns) for columns in (format.columns, *format.others))
    return f"{name} ({columns}{''.join(f' [{column}]' for column in format.optional)})"


def _meant(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), 1)
    return f"; did you mean `{close[0]}`?" if close else ""


_LIKELY = {
    "prompt": ("question", "query", "input", "problem", "instruction", "article", "source"),
    "completion": ("answer", "response", "output", "solution", "target", "summary"),
    "chosen": ("response_j", "preferred", "accepted", "better", "win", "chosen_response", "positive"),
    "rejected": ("response_k", "dispreferred", "refused", "worse", "lose", "rejected_response", "negative"),
    "label": ("desirable", "is_desirable", "liked", "thumbs_up", "class", "category"),
    "text": ("sentence", "review", "content"),
    "completions": ("steps", "solution_steps"),
    "labels": ("ratings", "step_labels"),
}
"""What other data sets call our columns."""


def _suggestion(row: Row, allowed: Mapping[str, Format]) -> str:
    """The column_map that would do, where the columns look like those of a format."""
    for format in allowed.values():
        for columns in (format.columns, *format.others):
            found = {
                column: next((name for name in (column, *_LIKELY.get(column, ())) if name in row), None)
                for column in columns
            }
            if len(columns) > 1 and all(found.values()):
                mapped = ", ".join(f"{column}: {name}" for column, name in found.items() if column != name)
                return f"perhaps `column_map: {{{mapped}}}`; "
    return "name your columns with `column_map: {our column: your column}`; "
