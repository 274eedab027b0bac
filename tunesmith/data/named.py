"""Data sets that have a name of their own: where they are on the Hub and how their rows are read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.configs.data import DataSection, PreferenceData, RewardData, TextData
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.data import formats

_CONVERTED = "refs/convert/parquet"
"""Branch on which the Hub keeps a Parquet copy of data sets that are themselves a script, which `datasets` 4 no longer runs."""


@dataclass(frozen=True)
class NamedDataset:
    """A Hub data set. `kind`: chat (for sft), text (for pretrain, and for sft as plain text), or preference."""

    repository: str
    description: str
    kind: str = "chat"
    subset: str | None = None
    split: str = "train"
    format: str | None = None
    column_map: Mapping[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    """Text around a prompt, with {prompt} in it."""
    system_prompt: str | None = None
    revision: str | None = None


NAMED: dict[str, NamedDataset] = {
    # --- those that torchtune names ---
    "alpaca": NamedDataset("tatsu-lab/alpaca", "52,000 instructions and answers written by GPT-3.5", format="alpaca"),
    "alpaca_cleaned": NamedDataset("yahma/alpaca-cleaned", "alpaca with many of its mistakes mended", format="alpaca"),
    "grammar": NamedDataset(
        "liweili/c4_200m",
        "sentences with mistakes, and corrected",
        format="prompt_completion",
        column_map={"prompt": "input", "completion": "output"},
        prompt_template="Correct this to standard English: {prompt}",
        revision=_CONVERTED,
    ),
    "samsum": NamedDataset(
        "knkarthick/samsum",
        "16,000 chats with a summary each",
        format="prompt_completion",
        column_map={"prompt": "dialogue", "completion": "summary"},
        prompt_template="Summarize this dialogue:\n{prompt}",
    ),
    "slimorca": NamedDataset("Open-Orca/SlimOrca-Dedup", "363,000 instructions answered by GPT-4", format="sharegpt"),
    "cnn_dailymail": NamedDataset(
        "abisee/cnn_dailymail", "300,000 news articles", "text", subset="3.0.0", column_map={"text": "article"}
    ),
    "wikitext": NamedDataset(
        "EleutherAI/wikitext_document_level",
        "whole articles of Wikipedia (subset wikitext-2-raw-v1, or wikitext-103-raw-v1)",
        "text",
        subset="wikitext-2-raw-v1",
        column_map={"text": "page"},
        revision=_CONVERTED,
    ),
    # --- others in wide use ---
    "c4": NamedDataset(
        "allenai/c4", "cleaned web pages, 305 GB in English: set `streaming: true`", "text", subset="en"
    ),
    "fineweb_edu": NamedDataset(
        "HuggingFaceFW/fineweb-edu",
        "educational web pages; the sample of 10 billion tokens",
        "text",
        subset="sample-10BT",
    ),
    "tinystories": NamedDataset("roneneldan/TinyStories", "2 million short stories in simple words", "text"),
    "gsm8k": NamedDataset(
        "openai/gsm8k",
        "7,500 grade-school sums with worked answers",
        subset="main",
        format="prompt_completion",
        column_map={"prompt": "question", "completion": "answer"},
    ),
    "dolly": NamedDataset(
        "databricks/databricks-dolly-15k",
        "15,000 instructions and answers written by people",
        format="alpaca",
        column_map={"input": "context", "output": "response"},
    ),
    "ultrachat": NamedDataset(
        "HuggingFaceH4/ultrachat_200k", "200,000 long conversations", split="train_sft", format="messages"
    ),
    "openhermes": NamedDataset("teknium/OpenHermes-2.5", "1 million instructions and chats", format="sharegpt"),
    "tulu3": NamedDataset("allenai/tulu-3-sft-mixture", "940,000 conversations of many kinds", format="messages"),
    "smoltalk": NamedDataset("HuggingFaceTB/smoltalk", "1 million conversations", subset="all", format="messages"),
    # --- pairs of answers; the first two are those that torchtune names ---
    "hh_rlhf_helpful": NamedDataset(
        "RLHFlow/HH-RLHF-Helpful-standard",
        "115,000 pairs of dialogues, the more helpful one chosen",
        "preference",
        format="preference",
    ),
    "stack_exchange_paired": NamedDataset(
        "lvwerra/stack-exchange-paired",
        "31 million pairs of answers on Stack Exchange: set `streaming: true`",
        "preference",
        format="preference",
        column_map={"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    "hh_rlhf": NamedDataset(
        "Anthropic/hh-rlhf", "161,000 pairs of dialogues, helpful or harmless", "preference", format="preference"
    ),
    "ultrafeedback": NamedDataset(
        "HuggingFaceH4/ultrafeedback_binarized",
        "61,000 pairs of answers, scored by GPT-4",
        "preference",
        split="train_prefs",
        format="preference",
    ),
}


def resolve(data: DataSection) -> tuple[DataSection, formats.Reading]:
    """`data` with a built-in name replaced by what it stands for, and how to read its rows."""
    from tunesmith.data import formats

    record = None if data.reader or Path(data.source).expanduser().exists() else NAMED.get(data.source)
    column_map = {**(record.column_map if record else {}), **data.column_map}
    if isinstance(data, TextData) and data.text_column != "text":
        column_map["text"] = data.text_column
    chosen = "text" if isinstance(data, TextData) else data.format
    system = None if isinstance(data, TextData) else data.system_prompt
    if record is None:
        return data, formats.Reading(chosen, column_map, system)
    if record.kind not in _taken(data):
        holds, recipes = _HOLDS[record.kind]
        raise UserError(
            f"the built-in data set `{data.source}` holds {holds}, which {recipes}; name another, or your own files"
        )
    own_format = "text" if record.kind == "text" else record.format
    reading = formats.Reading(chosen or own_format, column_map, system or record.system_prompt, record.prompt_template)
    split = data.split if data.split and not data.split.startswith("[") else record.split + (data.split or "")
    return (
        replace(
            data,
            source=record.repository,
            subset=data.subset or record.subset,
            split=split,
            revision=data.revision or record.revision,
        ),
        reading,
    )


_HOLDS = {
    "chat": ("conversations", "are for sft"),
    "text": ("plain texts", "are for pretrain and sft"),
    "preference": ("pairs of answers", "are for preference tuning and reward models"),
}


def _taken(data: DataSection) -> tuple[str, ...]:
    """Kinds of built-in data sets that a section takes."""
    if isinstance(data, PreferenceData | RewardData):
        return ("preference",)
    return ("text",) if isinstance(data, TextData) else ("chat", "text")
