"""Which stretches of a rendered conversation are to be learned, for any chat template.

A template with {% generation %} marks says it itself. Of one without, the answers are found by rendering again with
sentinels (code points that no text holds) in place of what the assistant said, and comparing: what is the same in both
is the template's. An answer's stretch begins where the generation prompt ends and goes through the end-of-turn token.
Where that can't be told for certain, a UserError names the template; nothing is guessed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from operator import gt
from typing import TYPE_CHECKING, Any

from tunesmith.data.chat_frame import frame_of
from tunesmith.data.chat_sentinels import (
    LEFT,
    RIGHT,
    SENTINEL,
    BadConversation,
    Message,
    common_prefix,
    contents,
    is_empty,
    is_plain,
    sentinel,
    with_sentinels,
)
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.data.chat import ChatTemplate

Span = tuple[int, int]
"""(start, end) in characters of the rendered text."""


class _Rendering:
    """One conversation through one template, rendered as often as needed."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools,
        add_generation_prompt: bool,
        args: Mapping[str, Any],
    ):
        self.template, self.messages, self.tools, self.args = template, messages, tools, args
        self.add_generation_prompt = add_generation_prompt
        self.text = self.render(messages, add_generation_prompt)
        if any(mark in self.text for mark in (LEFT, RIGHT, "\ufdd0", "\ufdd1")):
            raise BadConversation(
                "a message holds U+FDD0 to U+FDD3, which are no characters: take them out", None, "noncharacters"
            )
        self.regions: dict[int, Span | None] = {}

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self.template.render_prepared(messages, self.tools, add_generation_prompt, self.args)

    def fail(self, index: int, why: str) -> UserError:
        return UserError(
            f"{self.template.name} does not show which part of its text is message {index} ({why}); "
            "mark the assistant's part with {% generation %} … {% endgeneration %} in the template"
        )

    def region(self, index: int) -> Span | None:
        """Where what message `index` holds stands in the text, from its first to its last character; None: nowhere."""
        if index not in self.regions:
            self.regions[index] = self._region(index)
        return self.regions[index]

    def _region(self, index: int) -> Span | None:
        other = list(self.messages)
        other[index] = with_sentinels(other[index], index)
        marked = self.render(other, self.add_generation_prompt)
        found = list(SENTINEL.finditer(marked))
        if not found:
            if marked == self.text:
                return None
            raise self.fail(index, "the template changes its content")
        if len(found) > 1 and is_plain(self.messages[index]):
            raise self.fail(index, "it stands there more than once")
        before, after = marked[: found[0].start()], marked[found[-1].end() :]
        same = common_prefix(self.text[::-1], after[::-1])
        # A sentinel among a call's arguments stands in quotes, which other values do not.
        allowed = 16 if self.messages[index].get("tool_calls") else 0
        if len(after) - same > allowed:
            raise self.fail(index, "the text after it depends on its content")
        end, start = len(self.text) - same, common_prefix(self.text, before)
        # Thoughts within the content may stand where a template writes empty ones: those are its own words, too.
        if len(before) - start > allowed and not _own_words(self.text[start:end], self.messages[index]):
            raise self.fail(index, "the text before it depends on its content")
        return min(start, end), end


def _own_words(text: str, message: Message) -> bool:
    """Whether `text` is, but for white space, what the message says or a part of it."""
    content = message.get("content") or ""
    said = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return "".join(text.split()) in "".join(said.split())


def find(
    template: ChatTemplate,
    messages: list[Message],
    wanted: list[bool],
    train_on_input: bool,
    tools: list[dict] | None,
    add_generation_prompt: bool,
    args: Mapping[str, Any],
) -> tuple[str, list[Span]]:
    """The text of prepared `messages` and its stretches in the loss: of messages that are `wanted`, and of all around
    them if `train_on_input`."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if template.has_marks:
        text, marked = _marked_spans(template, messages, tools, add_generation_prompt, args)
        if not train_on_input and [index in answers for index in range(len(messages))] == wanted:
            return text, merge(marked)
        known = dict(zip(answers, marked, strict=True)) if len(marked) == len(answers) else {}
    else:
        known = {}
    rendering = _Rendering(template, messages, tools, add_generation_prompt, args)
    if train_on_input:
        left_out = [_span_of(rendering, index, known) for index, trains in enumerate(wanted) if not trains]
        return rendering.text, subtract((0, len(rendering.text)), merge(left_out))
    if not known and any(wanted[index] for index in answers):
        known = _plain_spans(rendering, answers)
    return rendering.text, merge([_span_of(rendering, index, known) for index, trains in enumerate(wanted) if trains])


def _span_of(rendering: _Rendering, index: int, known: Mapping[int, Span]) -> Span:
    if index in known:
        return known[index]
    region = rendering.region(index)
    is_answer = rendering.messages[index]["role"] == "assistant"
    if region is None and is_answer and not is_empty(rendering.messages[index]):
        raise BadConversation(
            f"{rendering.template.name} shows nothing of message {index} (assistant), which holds {contents(rendering.messages[index])}",
            index,
            "not shown by the template",
        )
    if region is None:
        return 0, 0
    if is_answer:
        return _start(rendering, index, region[0]), _end(rendering, index, region[1])
    end = frame_of(rendering.template, rendering.args).end
    return region[0], region[1] + (len(end) if end and rendering.text.startswith(end, region[1]) else 0)


def _marked_spans(template, messages, tools, add_generation_prompt, args) -> tuple[str, list[Span]]:
    """Text and the stretches that {% generation %} marks."""
    marks: list = []
    marked = template.render_prepared(messages, tools, add_generation_prompt, args, marks)
    pieces = re.split("[\ufdd0\ufdd1]", marked)
    if len(pieces) != 2 * len(marks) + 1 or re.search("\ufdd0[^\ufdd1]*\ufdd0", marked):
        raise BadConversation(
            f"{template.name}: its generation blocks can't be told apart (nested, repeated, or a message holds U+FDD0 or U+FDD1)",
            None,
            "generation marks",
        )
    spans, at = [], 0
    for number, piece in enumerate(pieces):
        if number % 2:
            spans.append((at, at + len(piece)))
        at += len(piece)
    text = "".join(pieces)
    if template.marks_may_move and template.render_prepared(messages, tools, add_generation_prompt, args) != text:
        raise UserError(f"{template.name} changes what a generation block gave: keep filters out of it")
    return text, spans


def _plain_spans(rendering: _Rendering, answers: list[int]) -> dict[int, Span]:
    """All answers at once where each is text alone that the template copies; {} where it is not so simple."""
    messages, text = rendering.messages, rendering.text
    if not all(is_plain(messages[index]) for index in answers):
        return {}
    other = [{**m, "content": sentinel(index)} if m["role"] == "assistant" else m for index, m in enumerate(messages)]
    pieces = SENTINEL.split(rendering.render(other, rendering.add_generation_prompt))
    if [int(number) for number in pieces[1::2]] != answers:
        return {}
    spans, at = {}, 0
    for number, index in enumerate(answers):
        if not text.startswith(pieces[2 * number], at):
            return {}
        at += len(pieces[2 * number])
        content = messages[index]["content"]
        said = next((form for form in (content, content.strip(), content.rstrip()) if text.startswith(form, at)), None)
        if said is None:
            return {}
        spans[index] = (at, at + len(said))
        at += len(said)
    if text[at:] != pieces[-1]:
        return {}
    rendering.regions.update(spans)
    return {
        index: (_start(rendering, index, start), _end(rendering, index, end)) for index, (start, end) in spans.items()
    }


def _start(rendering: _Rendering, index: int, region_start: int) -> int:
    """Where an answer begins whose own text begins at `region_start`: after the header, at the latest there."""
    text, frame = rendering.text, frame_of(rendering.template, rendering.args)
    plain = is_plain(rendering.messages[index])
    if any(header and text.endswith(header, 0, region_start) for header in frame.headers) or (
        plain and not any(frame.headers)
    ):
        return region_start
    prompt_end = _prompt_end(rendering, index, region_start)
    if prompt_end is not None:
        if any(frame.headers):
            return prompt_end
        if frame.opening is not None and text.startswith(frame.opening, prompt_end):
            return min(prompt_end + len(frame.opening), region_start)
        if frame.opening is not None and not frame.opening.strip():
            return prompt_end
    previous = _neighbour(rendering, index, -1)
    after = previous[1] if previous else 0
    found = [
        text.rfind(header, after, region_start) + len(header)
        for header in frame.headers
        if header and header in text[after:region_start]
    ]
    if found:
        return max(found)
    if plain:
        return region_start
    raise rendering.fail(index, "where it begins")


def _prompt_end(rendering: _Rendering, index: int, limit: int) -> int | None:
    """Where the prompt for answer `index` ends in the whole text: as the prompt rendered alone, or at least as that goes on
    after the last message before the answer (templates may write the messages before it differently then)."""
    text = rendering.text
    prompt = rendering.render(rendering.messages[:index], True) if index else None
    if prompt is None or text.startswith(prompt, 0, limit):
        return None if prompt is None else len(prompt)
    previous = rendering.region(index - 1)
    if previous is None:
        return None
    marked = [*rendering.messages[: index - 1], with_sentinels(rendering.messages[index - 1], index - 1)]
    closing = SENTINEL.split(rendering.render(marked, True))[-1]
    return previous[1] + len(closing) if text.startswith(closing, previous[1], limit) else None


def _end(rendering: _Rendering, index: int, region_end: int) -> int:
    """Where an answer ends whose own text ends at `region_end`: after its end-of-turn token, if it has one."""
    text, frame, message = rendering.text, frame_of(rendering.template, rendering.args), rendering.messages[index]
    own_end = frame.last_end if index == len(rendering.messages) - 1 else frame.end
    if own_end and text.startswith(own_end, region_end):
        return region_end + len(own_end)
    following = _neighbour(rendering, index, 1)
    limit = following[0] if following else len(text)
    own_end = (frame.end if following else frame.last_end).strip()
    ends = [end for end in (own_end, *sorted(rendering.template.ends)) if end]
    found = [text.find(end, region_end, limit) + len(end) for end in ends if text.find(end, region_end, limit) >= 0]
    if found:
        return min(found)
    if message.get("content") and not message.get("tool_calls"):
        return region_end
    whole = rendering.render(rendering.messages[: index + 1], False).rstrip()
    if text.startswith(whole) and len(whole) >= region_end:
        return len(whole)
    raise rendering.fail(index, "where it ends")


def _neighbour(rendering: _Rendering, index: int, step: int) -> Span | None:
    """The region of the nearest message before or after that the template shows."""
    index += step
    while 0 <= index < len(rendering.messages):
        region = rendering.region(index)
        if region is not None:
            return region
        index += step
    return None


def merge(spans: list[Span]) -> list[Span]:
    """The same stretches in order, without empty ones, joined where they touch."""
    joined: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def subtract(whole: Span, spans: list[Span]) -> list[Span]:
    """What is left of `whole` without `spans` (in order, disjoint)."""
    left, at = [], whole[0]
    for start, end in spans:
        left.append((at, start))
        at = end
    return merge([*left, (at, whole[1])])


def mask_of(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """For each token whether one of its characters lies in a span.

    `offsets`: (start, end) of each token in the text, in order; `spans`: sorted, disjoint (start, end).
    A token's start is taken to be its predecessor's end, as byte-level tokenizers leave spaces out of offsets.
    """
    ends = [end for _, end in offsets]
    if any(map(gt, ends, ends[1:])):
        ends = list(accumulate(ends, max))
    mask = [False] * len(ends)
    for start, end in spans:
        first, beyond = bisect_right(ends, start), bisect_right(ends, end)
        if beyond < len(ends) and (beyond == 0 or ends[beyond - 1] < end):
            beyond += 1  # it goes on after the span, but begins within
        mask[first:beyond] = [True] * (beyond - first)
    return mask
