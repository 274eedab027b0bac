"""Where rows come from and how they become training text."""

from dataclasses import field
from typing import Literal

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section


@section
class _Source(Checked):
    source: str
    """A file (json, jsonl, csv, parquet, txt), a folder or glob of them, a Hub id, or a built-in name (see `tune ls`)."""
    split: str | None = None
    """Split, with an optional slice such as train[:95%]; files without splits take a bare slice such as train[95%:]; default: train."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    column_map: dict[str, str] = field(default_factory=dict)
    """{our column: your column}, such as {prompt: question, completion: answer}."""
    packed: bool = False
    """Fill rows to max_seq_len with several documents that do not see each other."""
    streaming: bool = False
    """Read as the run goes on instead of indexing first: for sources larger than memory."""
    shuffle_buffer: int = 10_000
    """Rows held for shuffling (and packing) a stream."""
    weight: float | None = None
    """Share of the rows drawn from this source, relative to the weights of the others in a list; default: by size, every row once an epoch."""
    reader: str | None = None
    """Dotted path of your own function (source, split) -> iterable of row dicts."""

    def problems(self):
        yield from below(1, self, "shuffle_buffer")
        if self.weight is not None and self.weight <= 0:
            yield f"`weight` must be above 0, got {self.weight}"
        if not self.source:
            yield "`source` is empty; name a file, a folder, a Hub id, or a built-in name (see `tune ls`)"


@section
class ChatData(_Source):
    """Conversations: the answers are trained."""

    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    """How to read a row; default: detected from its columns."""
    train_on_input: bool = False
    """Train on prompts too, not only on answers."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """skip counts and reports rows that can't be used; error ends the run at the first."""


@section
class TextData(_Source):
    """Plain text: every token is trained."""

    packed: bool = True
    """Fill rows to max_seq_len."""
    text_column: str = "text"
    """Column that holds the text."""
    split_across_pack: bool = True
    """Cut documents to fill rows wholly; false starts a new row where one does not fit."""
    mask_documents: bool = True
    """Keep documents of a row from seeing each other."""
    document_split: str | None = None
    """Split plain text files into documents at this string, such as <|endoftext|>; default: a file is one document."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """skip counts and reports rows that can't be used; error ends the run at the first."""


@section
class PreferenceData(_Source):
    """Answers that people like more or less: pairs of a chosen and a rejected one, or single ones with a label."""

    format: Literal["preference", "unpaired"] | None = None
    """How to read a row; default: detected from its columns."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """skip counts and reports rows that can't be used; error ends the run at the first."""


@section
class RewardData(_Source):
    """What a reward model learns to score: pairs, labelled texts, or answers whose steps are labelled."""

    format: Literal["preference", "classification", "stepwise"] | None = None
    """How to read a row; default: detected from its columns."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    step_separator: str = "\n"
    """Text behind every step of an answer; a step's score is read at its last token."""
    label_names: list[str] = field(default_factory=list)
    """Names of the classes, in order, where labels are names; numbers count from 0."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """skip counts and reports rows that can't be used; error ends the run at the first."""

    def problems(self):
        yield from super().problems()
        if not self.step_separator:
            yield "`step_separator` is empty; name the text that ends a step, such as a line break"
        if len(set(self.label_names)) < len(self.label_names):
            yield "`label_names` names a class twice"


DataSection = ChatData | TextData | PreferenceData | RewardData
"""A source of any kind."""
