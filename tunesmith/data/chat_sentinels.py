"""Messages with sentinels in place of what they hold, and the error for conversations that can't be used."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.errors import UserError

Message = dict[str, Any]
LEFT, RIGHT = "\ufdd2", "\ufdd3"
SENTINEL = re.compile(f"{LEFT}(\\d+){RIGHT}")
"""A number between two code points that Unicode keeps out of texts."""
OWN_FIELDS = ("reasoning_content", "thinking", "reasoning")


class BadConversation(UserError):
    """A conversation that can't be rendered or learned; `index` is the message's, `reason` a few words to count by."""

    def __init__(self, text: str, index: int | None, reason: str):
        super().__init__(text)
        self.index = index
        self.reason = reason


def sentinel(number: int) -> str:
    return f"{LEFT}{number}{RIGHT}"


def is_empty(message: Message) -> bool:
    """Whether a message holds neither text nor thoughts nor calls."""
    content = message.get("content") or ""
    texts = (
        [content]
        if isinstance(content, str)
        else [str(part.get("text") or "") for part in content if isinstance(part, dict)]
    )
    thoughts = [message[name] for name in OWN_FIELDS if isinstance(message.get(name), str)]
    return not any(text.strip() for text in (*texts, *thoughts)) and not message.get("tool_calls")


def is_plain(message: Message) -> bool:
    """Whether a message holds text alone."""
    content = message.get("content")
    return isinstance(content, str) and bool(content) and not message.get("tool_calls") and "thinking" not in message


def with_sentinels(message: Message, number: int) -> Message:
    """The message with a sentinel in place of every text it holds; its shape, names of tools and ids stay."""
    mark, other = sentinel(number), dict(message)
    content = message.get("content")
    if isinstance(content, str) and content:
        other["content"] = mark
    elif isinstance(content, list):
        other["content"] = [{**part, "text": mark} for part in content]
    for name in OWN_FIELDS:
        if message.get(name):
            other[name] = mark
    if message.get("tool_calls"):
        other["tool_calls"] = [_call_with_sentinels(call, mark) for call in message["tool_calls"]]
    return other


def _call_with_sentinels(call: Any, mark: str) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_sentinels(call["function"], mark)}
    arguments = call.get("arguments")
    return {**call, "arguments": mark if isinstance(arguments, str) else {mark: mark}}


def common_prefix(one: str, two: str) -> int:
    """Length of what both begin with."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def contents(message: Message) -> str:
    names = ("content", "reasoning_content", "tool_calls")
    return " and ".join(name for name in names if message.get(name)) or "nothing"
