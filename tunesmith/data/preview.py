"""A few rows as the model will see them: tokens coloured by whether they are in the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.configs.data import DataSection
from tunesmith.data.cache import Reading
from tunesmith.data.documents import NumberedRow, RowReader, load_documents, numbered, skipped_text
from tunesmith.data.indexed import IndexedSource
from tunesmith.data.loader import DEFAULT_MAX_SEQ_LEN
from tunesmith.data.named import resolve
from tunesmith.data.parts import open_parts
from tunesmith.data.report import DataReport
from tunesmith.data.sources import open_rows
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.data.units import Units, likely_units

TRAINED = ("black on green", "black on bright_green")
READ = ("none", "dim")
"""Styles that alternate, so that the ends of tokens show."""
MOST_TOKENS = 1000
"""Shown of one row."""
_VALUES = {"answers": "desirable:", "classified": "class"}
"""What the value of a document says."""
OPEN, CLOSE = "⟦", "⟧"
"""Around what is in the loss, where there are no colours."""


def preview(config: Any, count: int = 3, console: Console | None = None) -> None:
    """Print the first `count` rows of each source of a training config as tokens, marked by the loss mask, and what became of all rows.

    In a terminal what is in the loss is green; elsewhere it stands between ⟦ and ⟧. Loads no model.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    tokenizer, max_seq_len = _tokenizer(config)
    for data in config.dataset if isinstance(config.dataset, list) else [config.dataset]:
        units = preview_source(data, tokenizer, count, console)
        if not data.streaming:
            resolved, reading = resolve(data)
            loaded = load_documents(resolved, reading, tokenizer, units)
            source = IndexedSource(loaded, resolved, max_seq_len, None, units)
            console.print(Text(str(DataReport([source.report(1.0)])), style="bold"))
    console.print(Text("green: in the loss" if console.is_terminal else f"{OPEN}…{CLOSE}: in the loss"))


def preview_source(data: DataSection, tokenizer: Tokenizer, count: int, console: Console) -> Units | None:
    """The same for one source, without what became of all rows; returns what its rows are shown as."""
    resolved, reading = resolve(data)
    rows = list(islice(_rows(resolved), count))
    units = likely_units(resolved, rows[0][2], reading, rows[0][1]) if rows else None
    reader = RowReader(resolved, reading, tokenizer, units)
    for number, place, row in rows:
        report = Reading()
        documents = reader.collect([(number, place, row)], report)
        console.print(Text(f"─── {place} ", style="bold") + Text(f"({reader.format})", style="dim"))
        console.print(Text(_short(row), style="dim"))
        if not len(documents.ids):
            console.print(Text(f"can't be used: {skipped_text(report)}\n", style="red"))
            continue
        for start, end, value in zip(documents.starts, documents.ends, documents.values):
            ids, mask = documents.ids[start:end].tolist(), documents.mask[start:end].tolist()
            console.print(tokens_as_text(ids[:MOST_TOKENS], mask[:MOST_TOKENS], tokenizer, console.is_terminal))
            if len(ids) > MOST_TOKENS:
                console.print(Text(f"… and {len(ids) - MOST_TOKENS:,} more tokens", style="dim"))
            marked = "where a score is read" if units and units.scored else "in the loss"
            about = f", {_VALUES[units.name]} {value:g}" if units and units.name in _VALUES else ""
            console.print(Text(f"{len(ids):,} tokens, {sum(mask):,} {marked}{about}\n", style="bold"))
    return units


def _tokenizer(config: Any) -> tuple[Any, int]:
    """The tokenizer of a run, and the length of its rows."""
    from tunesmith import hub
    from tunesmith.models.families import model_config, named_sizes

    options = config.tokenizer
    sizes = named_sizes()
    if config.model in sizes:
        family, hf_config, path = sizes[config.model]
        shape = family.read_config(hf_config)
    else:
        path = hub.resolve(config.model, ignore_patterns=["*.safetensors", "*.bin", "*.pth", "*.gguf"])
        _, family, shape = model_config(path)
    tokenizer = find_tokenizer(options, path, family.chat_templates)
    return tokenizer, options.max_seq_len or min(
        DEFAULT_MAX_SEQ_LEN, shape.max_position_embeddings or DEFAULT_MAX_SEQ_LEN
    )


def _rows(data: DataSection) -> Iterator[NumberedRow]:
    if not data.streaming:
        yield from numbered(open_rows(data))
        return
    parts, _ = open_parts(data)
    rows, cursor = parts[0].read(parts[0].start, 16)
    while rows:
        yield from ((number, place, row) for number, (place, row) in enumerate(rows))
        rows, cursor = parts[0].read(cursor, 16) if cursor else ([], None)


def tokens_as_text(ids: list[int], mask: list[bool], tokenizer: Any, coloured: bool) -> Text:
    """The tokens as text, marked by `mask`: coloured token by token, or with brackets around what is in the loss."""
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    shown = Text()
    inside = False
    for number, (token, trained) in enumerate(zip(ids, mask)):
        if trained != inside and not coloured:
            shown.append(OPEN if trained else CLOSE)
        inside = trained
        shown.append(decoder.add(token), (TRAINED if trained else READ)[number % 2] if coloured else "")
    shown.append(decoder.finish())
    if inside and not coloured:
        shown.append(CLOSE)
    return shown


def _short(row: Any, width: int = 300) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= width else f"{text[: width - 1]}…"
