"""What preference data consists of: units of one or two documents that always share a training row. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from tunesmith.configs.data import DataSection, PreferenceData, RewardData
from tunesmith.data.formats import BadRow, Example, Format, Message, Reading, Row, choose_format, shown
from tunesmith.data.preference_formats import CLASSIFICATION, PREFERENCE, STEPWISE, UNPAIRED
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError

NOTHING_TRAINED = "nothing in the loss"


@dataclass(frozen=True)
class Units:
    """What a recipe asks of its data."""

    name: str
    size: int
    """Documents of a unit."""
    counted: str
    """What a batch counts them as."""
    formats: Mapping[str, Format]
    """In which rows may be."""
    scored: bool = False
    """Whether a score is read at marked tokens, instead of the next token predicted: then all tokens are inputs."""

    @property
    def mismatched(self) -> bool:
        """Whether the second document is the answer to another prompt."""
        return self.counted == "answers" and self.size == 2

    @property
    def cut(self) -> bool:
        """Whether a document that is too long is cut; a score for a whole text can't be read within it."""
        return not self.scored or self.counted == "steps"


_PAIRS: Mapping[str, Format] = {"preference": PREFERENCE}
_SINGLE: Mapping[str, Format] = {"unpaired": UNPAIRED}

PREFERENCE_UNITS = {
    units.name: units
    for units in (
        Units("pairs", 2, "pairs", _PAIRS),
        Units("answers", 1, "answers", {**_PAIRS, **_SINGLE}),
        Units("answers and mismatched", 2, "answers", {**_PAIRS, **_SINGLE}),
    )
}
"""Pairs: a chosen and a rejected answer to a prompt. Answers: one, and whether it is desirable. Mismatched: the same prompt
with the answer to another, from which KTO (https://arxiv.org/abs/2402.01306, section 4.1) estimates its reference point."""

REWARD_UNITS = {
    "preference": Units("scored pairs", 2, "pairs", _PAIRS, scored=True),
    "classification": Units("classified", 1, "answers", {"classification": CLASSIFICATION}, scored=True),
    "process": Units("scored steps", 1, "steps", {"stepwise": STEPWISE}, scored=True),
}
"""By the task of a reward model."""


def choose_units(row: Row, reading: Reading, place: str, units: Units) -> str:
    """The format of a source; UserError where it is none that gives `units`."""
    others = {name: format for one in REWARD_UNITS.values() for name, format in one.formats.items()}
    known = {**units.formats, **(others if units.scored else _SINGLE)}
    name = choose_format(row, reading, place, known)
    if name in units.formats:
        return name
    if not units.scored:
        raise UserError(
            f"{place}: an answer with a label (the format unpaired) is half of no pair: train on it with `loss.type: kto` or `bco`, which take answers one by one"
        )
    tasks = {name: task for task, one in REWARD_UNITS.items() for name in one.formats}
    own = next(task for task, one in REWARD_UNITS.items() if one is units)
    raise UserError(f"{place}: the format {name} is for the task `{tasks[name]}`, and this run's task is `{own}`")


def likely_units(data: DataSection, row: Row, reading: Reading, place: str) -> Units | None:
    """What the rows of a source are best shown as, no recipe being asked; None for conversations and texts."""
    if isinstance(data, PreferenceData):
        name = choose_format(row, reading, place, {**_PAIRS, **_SINGLE})
        return PREFERENCE_UNITS["pairs" if name == "preference" else "answers"]
    if isinstance(data, RewardData):
        by_format = {name: one for one in REWARD_UNITS.values() for name in one.formats}
        known = {name: format for one in REWARD_UNITS.values() for name, format in one.formats.items()}
        return by_format[choose_format(row, reading, place, known)]
    return None


class Encoded(NamedTuple):
    """A document of a unit; see cache.Tokenized."""

    ids: Sequence[int]
    mask: Sequence[bool]
    value: float
    scores: Sequence[int] | None = None


Conversation = tuple[list[Message], list[Any] | None, float]
"""Messages, tools, value."""


def with_mismatched(examples: Iterable[tuple[int, str, Example]], are_all: bool) -> Iterator[tuple[int, str, Example]]:
    """Each example with the answers of the next one that has another prompt as "other"; behind the last comes the first again.

    Without another prompt `are_all` of a source are refused; in a part of a stream such an example is its own "other".
    """
    waiting: list[tuple[int, str, Example]] = []
    first: list[Example] = []
    """One of each of the first two prompts."""
    for item in examples:
        if len(first) < 2 and not any(item[2]["prompt"] == example["prompt"] for example in first):
            first.append(item[2])
        if waiting and item[2]["prompt"] != waiting[0][2]["prompt"]:
            yield from ((number, place, {**example, "other": item[2]}) for number, place, example in waiting)
            waiting = []
        waiting.append(item)
    if are_all and waiting and len(first) < 2:
        raise UserError(
            f"{waiting[0][1]}: all rows have the same prompt, and `loss.type: kto` needs answers to other prompts to compare with: add rows, "
            "or take `loss.type: bco`"
        )
    for number, place, example in waiting:
        other = next((one for one in first if one["prompt"] != example["prompt"]), example)
        yield number, place, {**example, "other": other}


def conversations(example: Example, units: Units) -> list[list[Conversation]]:
    """The documents of each unit that an example gives."""
    prompt, tools = example["prompt"], example["tools"]
    if units.counted == "pairs":
        return [[([*prompt, *example[side]], tools, example["margin"]) for side in ("chosen", "rejected")]]
    sides = {"completion": float(example["label"])} if "completion" in example else {"chosen": 1.0, "rejected": 0.0}
    found: list[list[Conversation]] = []
    for side, value in sides.items():
        answers = [example[side]]
        if units.size == 2:
            other = example["other"]
            answers.append(other.get(side) or other.get("completion") or other["chosen"])
        found.append([([*prompt, *answer], tools, value) for answer in answers])
    return found


def encode_pairs_or_answers(
    examples: Sequence[Example], units: Units, tokenizer: Tokenizer
) -> Iterator[list[list[Encoded] | UserError | BadRow]]:
    """For each example its units as tokens, or what is wrong with a unit."""
    drafts = [conversations(example, units) for example in examples]
    flat = list(chain.from_iterable(chain.from_iterable(drafts)))
    results = iter(_whole(flat, tokenizer) if units.scored else _answers(flat, tokenizer))
    for draft in drafts:
        yield [_unit([next(results) for _ in unit], [value for _, _, value in unit], units) for unit in draft]


def _unit(results: list[Any], values: list[float], units: Units) -> list[Encoded] | UserError | BadRow:
    fault = next((result for result in results if isinstance(result, UserError)), None)
    if fault is not None:
        return fault
    if not all(any(mask[0 if units.scored else 1 :]) for _, mask in results):
        return BadRow(NOTHING_TRAINED)
    if units.counted == "pairs" and results[0][0] == results[1][0]:
        return BadRow("chosen equals rejected", "once they are tokens")
    return [Encoded(ids, mask, value, [0] if units.scored else None) for (ids, mask), value in zip(results, values)]


def _answers(flat: list[Conversation], tokenizer: Tokenizer) -> list[Any]:
    """Ids and loss mask of conversations, or a UserError."""
    return tokenizer.encode_chat_batch([messages for messages, _, _ in flat], [tools for _, tools, _ in flat])


def _whole(flat: list[Conversation], tokenizer: Tokenizer) -> list[Any]:
    """Ids of conversations, and a mask of the token at which they end; or a UserError."""
    results: list[Any] = []
    for messages, tools, _ in flat:
        try:
            results.append(tokenizer.render_chat(messages, tools))
        except UserError as error:
            results.append(error)
    texts = [text for text in results if isinstance(text, str)]
    ids = iter(tokenizer.encode_batch(texts, add_special_tokens=False) if texts else [])
    return [_marked(next(ids), tokenizer.pad_id) if isinstance(result, str) else result for result in results]


def _marked(ids: list[int], pad_id: int) -> tuple[list[int], list[bool]]:
    """Ids and a mask of the last one that doesn't also stand for padding: there transformers reads a text's score."""
    last = max((place for place, token in enumerate(ids) if token != pad_id), default=0)
    return ids, [place == last for place in range(len(ids))]


def encode_classified(
    examples: Sequence[Example], label_names: Sequence[str], tokenizer: Tokenizer
) -> Iterator[list[list[Encoded] | UserError | BadRow]]:
    """Texts as they are, conversations by the chat template; the class is read at the last token."""
    chats = [(example["messages"], example["tools"], 0.0) for example in examples if "messages" in example]
    texts = [example["text"] for example in examples if "text" in example]
    of_chats = iter(_whole(chats, tokenizer))
    of_texts: Iterator[Any] = iter(
        [_marked(ids, tokenizer.pad_id) for ids in tokenizer.encode_batch(texts)] if texts else []
    )
    for example in examples:
        result = next(of_chats if "messages" in example else of_texts)
        if isinstance(result, UserError):
            yield [result]
            continue
        try:
            label = _class(example["label"], label_names)
            ids, mask = result
            yield [[Encoded(ids, mask, float(label), [label])] if ids else BadRow("empty text")]
        except BadRow as bad:
            yield [bad]


def _class(label: Any, names: Sequence[str]) -> int:
    """The number of a class; CSV files have numbers as text."""
    if isinstance(label, str) and label in names:
        return list(names).index(label)
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str) and not names:
        raise UserError(
            f"labels are names, such as {shown(label)}: list them all in `label_names`, in the order of the classes"
        )
    if not isinstance(label, int) or label < 0 or (names and label >= len(names)):
        known = f"`label_names` has {', '.join(names)}" if names else "classes count from 0"
        raise BadRow("a label that is no class", f"it is {shown(label)}; {known}")
    return int(label)


def encode_steps(examples: Sequence[Example], separator: str, tokenizer: Tokenizer) -> Iterator[list[list[Encoded]]]:
    """A prompt, then each step and a separator, tokenized one by one; a step's label is read at its separator's last token.

    As TRL's PRMTrainer has it, whose models read their scores there.
    """
    ends = tokenizer.encode(separator, add_special_tokens=False)
    if not ends:
        raise UserError(f"`step_separator` {separator!r} is no token of this tokenizer; choose another text")
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for example in examples:
        prompt = example["prompt"]
        if isinstance(prompt, str):
            ids = [*start, *tokenizer.encode(prompt, add_special_tokens=False)]
        else:
            ids = list(tokenizer.encode_prompt(prompt, example["tools"]))
        mask = [False] * len(ids)
        for step in tokenizer.encode_batch(example["completions"], add_special_tokens=False):
            ids += [*step, *ends]
            mask += [False] * (len(step) + len(ends) - 1) + [True]
        yield [[Encoded(ids, mask, 0.0, [int(label) for label in example["labels"]])]]
