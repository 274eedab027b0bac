"""From a row of preference data to a prompt and its answers: pairs, answers with a label, and what reward models score. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.data.formats import (
    BadRow,
    Example,
    Format,
    Message,
    Reading,
    Row,
    check_answers,
    decoded,
    framed,
    instruction_of,
    shown,
    text_of,
    tools_of,
    turns_of,
    with_system,
)

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}

# --- one function per format ---------------------------------------------------------------------


def read_preference(row: Row, reading: Reading) -> Example:
    """A prompt with a chosen and a rejected answer: {"prompt": messages, "chosen": messages, "rejected": messages, "tools", "margin"}.

    The prompt is `prompt`, or Alpaca's instruction and input, or where there is none what both answers begin with.
    Answers are strings or lists of messages, also such that begin with the prompt, and hh-rlhf's dialogues.
    """
    chosen, rejected = (_answer(row[column], row, column) for column in ("chosen", "rejected"))
    prompt, chosen, rejected = _divided(_prompt(row, reading), chosen, rejected, reading)
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    check_answers(chosen, "chosen")
    check_answers(rejected, "rejected")
    tools = tools_of(row.get("tools"))
    return {
        "prompt": _prepared(prompt, row, reading),
        "chosen": chosen,
        "rejected": rejected,
        "tools": tools,
        "margin": _margin(row),
    }


def read_unpaired(row: Row, reading: Reading) -> Example:
    """An answer, and whether it is desirable: {"prompt": messages, "completion": messages, "tools", "label"}.

    Of whole conversations (`messages`) the answer is all behind the last message of the user.
    """
    label = _truth(row["label"])
    prompt, answer = _prompt_and_answer(row, reading)
    if not prompt or not prompt[-1]["content"].strip() and not prompt[-1].get("tool_calls"):
        raise BadRow("empty prompt")
    check_answers(answer, "completion" if "completion" in row else "messages")
    tools = tools_of(row.get("tools"))
    return {"prompt": _prepared(prompt, row, reading), "completion": answer, "tools": tools, "label": label}


def read_classification(row: Row, reading: Reading) -> Example:
    """A text or a conversation with its class: {"text" or "messages", "tools", "label"}; see label_names for classes by name."""
    label = row["label"]
    if "text" in row:
        text = text_of(row["text"], "text")
        if not text.strip():
            raise BadRow("empty text")
        return {"text": text, "label": label}
    if "completion" in row:
        prompt, answer = _prompt_and_answer(row, reading)
        turns = [*prompt, *answer]
    else:
        turns = turns_of(row, "messages", "role", "content")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in turns):
        raise BadRow("empty text")
    return {"messages": with_system(turns, row, reading), "tools": tools_of(row.get("tools")), "label": label}


def read_stepwise(row: Row, reading: Reading) -> Example:
    """An answer in steps, each with a label: {"prompt": text or messages, "completions": texts, "labels": bools, "tools"}."""
    steps, labels = decoded(row["completions"], "completions"), decoded(row["labels"], "labels")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise BadRow("column `completions` is not a list of texts", f"it is {shown(steps)}")
    if not isinstance(labels, list):
        raise BadRow("column `labels` is not a list", f"it is {shown(labels)}")
    if len(steps) != len(labels):
        raise BadRow("as many completions as labels are needed", f"{len(steps)} completions, {len(labels)} labels")
    if not steps or not all(step.strip() for step in steps):
        raise BadRow("empty answer", "column `completions`")
    prompt: Any = row["prompt"]
    if not isinstance(prompt, str):
        prompt = _prepared(turns_of(row, "prompt", "role", "content"), row, reading)
    elif not prompt.strip():
        raise BadRow("empty prompt")
    elif row.get("system") or reading.system_prompt is not None:
        prompt = _prepared([{"role": "user", "content": framed(prompt, reading)}], row, reading)
    else:
        prompt = framed(prompt, reading)
    return {
        "prompt": prompt,
        "completions": steps,
        "labels": [_truth(label) for label in labels],
        "tools": tools_of(row.get("tools")),
    }


PREFERENCE = Format(
    ("chosen", "rejected"),
    ("prompt", "instruction", "input", "margin", "score_chosen", "score_rejected", "system", "tools"),
    read_preference,
)
UNPAIRED = Format(("prompt", "completion", "label"), ("system", "tools"), read_unpaired, (("messages", "label"),))
CLASSIFICATION = Format(
    ("text", "label"),
    ("system", "tools"),
    read_classification,
    (("messages", "label"), ("prompt", "completion", "label")),
)
STEPWISE = Format(("prompt", "completions", "labels"), ("system", "tools"), read_stepwise)

# --- prompts and answers -------------------------------------------------------------------------


def _prompt(row: Row, reading: Reading) -> list[Message] | str | None:
    """The prompt as messages, text, or None where the answers are to tell it."""
    if row.get("prompt") is None:
        return instruction_of(row, reading) if row.get("instruction") is not None else None
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        return turns_of(row, "prompt", "role", "content")
    if not prompt.strip():
        raise BadRow("empty prompt")
    turns = _dialogue(prompt)
    if turns and turns[-1] == _said(""):
        turns.pop()  # where the answer is to begin
    return turns or framed(prompt, reading)


def _answer(value: Any, row: Row, column: str) -> list[Message] | str:
    """An answer as text, or as messages where it is a conversation."""
    if isinstance(value, str):
        return _dialogue(value) or value
    return turns_of({column: [value] if isinstance(value, Mapping) else value}, column, "role", "content")


def _dialogue(text: str) -> list[Message] | None:
    """The turns of hh-rlhf's form, "\\n\\nHuman: …\\n\\nAssistant: …"; None of other texts."""
    if not text.lstrip().startswith("Human:"):
        return None
    _, *parts = _SPEAKER.split(text.strip())
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _divided(
    prompt: list[Message] | str | None, chosen: list[Message] | str, rejected: list[Message] | str, reading: Reading
) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt, and each answer without it, as messages."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one answer is text and the other is messages")
    if isinstance(chosen, str) and prompt is None:
        begin = _common_words(chosen, str(rejected))
        return _divided(framed(chosen[:begin].strip(), reading), chosen[begin:], str(rejected)[begin:], reading)
    pair = [[_said(answer)] if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if given is not None and all(answer[: len(given)] == given for answer in pair):
        pair = [answer[len(given) :] for answer in pair]
    elif not isinstance(chosen, str) and not isinstance(prompt, list):
        begin = _common_turns(*pair)
        if begin or given is None:  # a prompt beside whole conversations only repeats what they begin with
            given, pair = pair[0][:begin], [answer[begin:] for answer in pair]
            if all(turn["role"] in ("system", "developer") for turn in given):
                raise BadRow("no common prompt", "the answers begin differently")
    if not given or not given[-1]["content"].strip() and not given[-1].get("tool_calls"):
        raise BadRow("empty prompt")
    return given, pair[0], pair[1]


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _common_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with, so that something is left of each."""
    most = max(0, min(len(chosen), len(rejected)) - 1)
    same = next((number for number in range(most) if chosen[number] != rejected[number]), most)
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return same


def _common_words(chosen: str, rejected: str) -> int:
    """How many characters both texts begin with, up to the end of a word."""
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    most = min(len(chosen), len(rejected))
    same = next((number for number in range(most) if chosen[number] != rejected[number]), most)
    while same and not chosen[same - 1].isspace():
        same -= 1
    if not chosen[:same].strip():
        raise BadRow("no common prompt", "the answers begin differently")
    return same


def _prompt_and_answer(row: Row, reading: Reading) -> tuple[list[Message], list[Message]]:
    """Of `prompt` and `completion`, or of `messages`."""
    if "completion" in row:
        prompt, answer = _prompt(row, reading), _answer(row["completion"], row, "completion")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        return turns, [_said(answer)] if isinstance(answer, str) else answer
    turns = turns_of(row, "messages", "role", "content")
    asked = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    begin = asked[-1] + 1 if asked else 0
    return turns[:begin], turns[begin:]


def _prepared(turns: list[Message], row: Row, reading: Reading) -> list[Message]:
    """A prompt: with its system message, and nothing of it in the loss."""
    return [
        {**{key: value for key, value in turn.items() if key != "train"}, "weight": 0}
        for turn in with_system(turns, row, reading)
    ]


# --- labels --------------------------------------------------------------------------------------


def _truth(value: Any) -> bool:
    """true or false, also as 1 or 0; CSV files have them as text."""
    known = _TRUTHS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(known, bool | int | float) and known in (0, 1):
        return bool(known)
    raise BadRow("a label that is neither true nor false", f"it is {shown(value)}")


def _margin(row: Row) -> float:
    """How much better the chosen answer is; 0 where nothing says so."""
    if row.get("margin") is not None:
        return _number(row["margin"], "margin")
    for better, worse in _SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            return _number(row[better], better) - _number(row[worse], worse)
    return 0.0


def _number(value: Any, column: str) -> float:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise BadRow(f"column `{column}` is not a number", f"it is {shown(value)}")
    return number
