"""What is evaluated: task files, text files, models beside. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.configs.evaluate import Evaluate, is_task_path
from tunesmith.errors import UserError
from tunesmith.hub import follow_latest
from tunesmith.training.preflight.files import ADAPTER_FILE, model_folder, not_a_folder, weights_folder


def evaluation_problems(config: Any, notes: list[str]) -> Iterator[str]:
    if not isinstance(config, Evaluate):
        return
    if not config.tasks and not config.text_files:
        yield "there is nothing to evaluate: name `tasks`, or text files in `perplexity`"
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        yield "`tasks` needs the package lm_eval, which is not installed: pip install 'tunesmith[eval]'"
    for name in config.tasks:
        if is_task_path(name) and not Path(name).expanduser().exists():
            yield f"`tasks`: there is no file or folder {name}"
    if config.include_path and not Path(config.include_path).expanduser().is_dir():
        yield f"`include_path`: there is no folder {config.include_path}"
    for name in config.text_files:
        yield from _text_file(name)
    for name in config.compared:
        yield from _compared(name, notes)
    for name in (config.model, *config.compared):
        yield from _length(config, name)


def _text_file(name: str) -> Iterator[str]:
    file = Path(name).expanduser()
    if not file.is_file():
        yield f"`perplexity`: there is no file {name}"
    elif file.stat().st_size == 0:
        yield f"`perplexity`: {name} is empty"


def _length(config: Evaluate, name: str) -> Iterator[str]:
    """Whether a model can read what it is to be given at a time, where its config.json is here."""
    from tunesmith.models.families import model_config

    try:
        if (folder := weights_folder(name)) is None:
            return
        shape = model_config(folder)[2]
    except UserError:
        return  # told where the model is looked at
    if config.max_length is not None and config.max_length > shape.context_length:
        yield f"`max_length`: {name} can read {shape.context_length} tokens, not {config.max_length}"
    elif config.stride is not None and config.stride > (config.max_length or shape.max_position_embeddings):
        longest = config.max_length or shape.max_position_embeddings
        yield f"`stride` = {config.stride} leaves gaps: {name} reads {longest} tokens at a time"


def _compared(name: str, notes: list[str]) -> Iterator[str]:
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from not_a_folder("compare", name, notes)
    elif not folder.is_dir():
        yield f"`compare`: {name} is a file; name the folder that holds it and its config.json"
    elif (folder / "config.json").is_file() or not (folder / ADAPTER_FILE).is_file():
        yield from model_folder(folder, weights=True)
