"""What a chat template writes around answers: headers and end-of-turn tokens, found with a sample conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.chat_sentinels import BadConversation, common_prefix, sentinel

if TYPE_CHECKING:
    from tunesmith.data.chat import ChatTemplate


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer, found with a sample conversation."""

    headers: tuple[str, ...]
    """Texts after which an answer begins: the generation prompt, and the header as it stands in the history."""
    opening: str | None
    """What stands between the history and an answer if the template knows no generation prompt; None: not to be told."""
    end: str
    """What ends an answer that is followed by another message; "": nothing does."""
    last_end: str
    """What ends the last answer; mostly the same."""


def frame_of(template: ChatTemplate, args: Mapping[str, Any]) -> Frame:
    """What the template writes around answers; found once for each set of arguments."""
    key = json.dumps(args, sort_keys=True, default=str)
    if key not in template.probes:
        template.probes[key] = _probe(template, args)
    return template.probes[key]


def _probe(template: ChatTemplate, args: Mapping[str, Any]) -> Frame:
    first, answer, second = (sentinel(number) for number in (1, 2, 3))
    asked = [{"role": "user", "content": first}]
    answered = [*asked, {"role": "assistant", "content": answer}]
    try:
        closed, prompt, last, history = (
            template.render_prepared(messages, None, ask, args)
            for messages, ask in (
                (asked, False), (asked, True), (answered, False), ([*answered, {"role": "user", "content": second}], False)
            )
        )  # fmt: skip
    except BadConversation:
        return Frame((), None, "", "")
    if any(
        text.count(part) != 1 for text, part in ((prompt, first), (last, answer), (history, answer), (history, second))
    ):
        return Frame((), None, "", "")
    after_question = [text.partition(first)[2] for text in (closed, prompt, history)]
    shared = common_prefix(after_question[0], after_question[1])
    in_history = after_question[2].partition(answer)[0]
    headers = [after_question[1][shared:]]
    if headers[0] and in_history[:shared] == after_question[1][:shared]:
        # As far as the prompt and the history agree: a prompt may go on with an opening of the answer itself.
        headers.append(in_history[shared : common_prefix(in_history, after_question[1])])
    opening = last[len(closed) : last.index(answer)] if last.startswith(closed) else None
    tail, inner = last.partition(answer)[2], history.partition(answer)[2].partition(second)[0]
    last_end = _leading(template, tail, inner)
    end = last_end
    if not last_end or not inner.startswith(last_end):
        end = _leading(template, inner, tail)
        if not tail.startswith(end) and not after_question[0].startswith(end):
            end = ""  # it ends neither the last answer nor a question: the next message's header then
    return Frame(tuple(header for header in headers if header.strip()), opening, end, last_end)


def _leading(template: ChatTemplate, tail: str, other: str) -> str:
    """What ends an answer that `tail` follows: an added token, and those right after it that `other`, which follows an
    answer elsewhere, has too; else the first word."""
    at = len(tail) - len(tail.lstrip())
    first = _token_at(template, tail, at)
    if not first:
        word = re.match(r"\s*\S+", tail)
        return word.group() if word else ""
    at += len(first)
    while (token := _token_at(template, tail, at)) and other.startswith(tail[: at + len(token)]):
        at += len(token)
    return tail[:at]


def _token_at(template: ChatTemplate, text: str, at: int) -> str:
    return max((token for token in template.added_tokens if token and text.startswith(token, at)), key=len, default="")
