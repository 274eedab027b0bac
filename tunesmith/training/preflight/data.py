"""Where rows come from. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.training.preflight.files import HUB_ID
from tunesmith.training.preflight.machine import importable


def data_problems(config: Any, notes: list[str]) -> Iterator[str]:
    for option in ("dataset", "dataset_val"):
        given = getattr(config, option, None)
        sources = given if isinstance(given, list) else [given] if given else []
        if isinstance(given, list) and not given:
            yield f"`{option}` is an empty list; name at least one source"
        for index, source in enumerate(sources):
            dotted = f"{option}.{index}" if isinstance(given, list) else option
            yield from _source(source, dotted, notes)
            if source.packed and config.tokenizer.max_seq_len is None:
                notes.append(
                    f"`{dotted}.packed` fills rows to the default length, as `tokenizer.max_seq_len` is not set"
                )


def _source(source: Any, option: str, notes: list[str]) -> Iterator[str]:
    from tunesmith.data import named

    name = source.source
    if source.reader is not None:
        file, is_file, _ = source.reader.rpartition(".py:")
        if is_file and not Path(f"{file}.py").expanduser().is_file():
            yield f"`{option}.reader`: there is no file {file}.py"
        elif not is_file and not importable(source.reader):
            yield f"`{option}.reader`: no module {source.reader.rpartition('.')[0]} can be imported"
        return
    if name in named.NAMED or Path(name).expanduser().exists():
        try:
            resolved, reading = named.resolve(source)
        except UserError as error:
            yield f"`{option}.source`: {error}"
            return
        from tunesmith.training.preflight.rows import check_rows

        try:
            check_rows(resolved, reading)
        except UserError as error:
            yield str(error)
        return
    if any(sign in name for sign in "*?["):
        base = Path(name).expanduser()
        if not any(base.parent.glob(base.name)) and "**" not in name:
            yield f"`{option}.source`: no file matches {name}"
    elif Path(name).suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt", ".tsv", ".gz") or name.startswith(
        (".", "/", "~")
    ):
        yield f"`{option}.source`: there is no file {name}"
    elif HUB_ID.fullmatch(name):
        if importlib.util.find_spec("datasets") is None:
            yield f"`{option}.source`: {name} is taken for a Hub id, which needs the package datasets: pip install 'tunesmith[datasets]'"
        notes.append(f"{name} is taken for a Hub id, which is looked up when the run starts")
    else:
        import difflib

        near = difflib.get_close_matches(name, named.NAMED, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else "; `tune ls` lists the built-in names"
        yield f"`{option}.source`: {name} is no file, folder or built-in data set{hint}"
