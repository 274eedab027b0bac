"""Evaluation: scores on tasks, perplexity of texts, models side by side.

tune run evaluate model=run/checkpoints/latest 'tasks=[hellaswag, gsm8k]' limit=100
tune run evaluate model=Qwen/Qwen3-0.6B 'tasks=[./my_task.yaml]' apply_chat_template=true
tune run evaluate model=run/checkpoints/latest compare=Qwen/Qwen3-0.6B 'tasks=[arc_easy]' perplexity=book.txt
tune run --nproc_per_node 2 evaluate model=… 'tasks=[mmlu]'                 each process has the model, and answers its share
tune run --nproc_per_node 8 evaluate model=… 'tasks=[mmlu]' tensor_parallel_dim=4   four processes hold one that is too large
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint.hf import explain_full_disk
from tunesmith.config import dump
from tunesmith.configs.evaluate import Evaluate
from tunesmith.configs.layout import Layout
from tunesmith.configs.shared import TokenizerConfig
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import UserError, require
from tunesmith.eval.bars import WithoutBars
from tunesmith.eval.compare import Difference, compare_tasks, compare_texts
from tunesmith.eval.report import write_report
from tunesmith.eval.tables import Table, difference_table, print_table, task_table, text_table
from tunesmith.eval.texts import TextScore, read_texts, score_file
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.device import device_name, pick_device, supports_bf16
from tunesmith.parallel.mesh import A_DAY, Mesh, Ranks, Replicas, start_mesh, stop_mesh
from tunesmith.training.dtypes import DTYPES
from tunesmith.training.load import load_model
from tunesmith.training.preflight import check
from tunesmith.training.progress import format_seconds
from tunesmith.training.source import tokenizer_folder


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    """In tables and files."""
    model: str
    adapter: str | None
    tokenizer: TokenizerConfig


@dataclass
class Evaluated:
    """What became of one model."""

    name: str
    results: dict[str, Any] | None = None
    """The harness's, with all samples."""
    texts: list[TextScore] = field(default_factory=list)
    num_truncated: int = 0
    seconds: float = 0.0


def main(config: Evaluate) -> None:
    check(config)
    device = pick_device(config.device)
    if config.dtype == "bf16" and not supports_bf16(device):
        raise UserError(f"{device} has no bf16: use `dtype: fp16` or `dtype: fp32`")
    texts = {file: read_texts(file) for file in config.text_files}
    if (folder := _folder(config)) is not None:
        with explain_full_disk(folder):  # now, and not when all is computed
            folder.mkdir(parents=True, exist_ok=True)
    try:
        mesh = start_mesh(device, Layout.of(config), A_DAY)
        if config.seed is None:
            drawn = mesh.ranks.from_main(lambda: int.from_bytes(os.urandom(4), "little"))
            config = dataclasses.replace(config, seed=drawn)
        with _quiet(is_shown=mesh.is_main):
            tasks = _load_tasks(config, mesh.ranks) if config.tasks else None
            models = [_evaluate(config, subject, mesh, tasks, texts) for subject in _subjects(config)]
        if mesh.is_main:
            _tell(config, device, models, tasks)
    finally:
        stop_mesh()


def _load_tasks(config: Evaluate, ranks: Ranks) -> Any:
    """Ranks read data one after the other: what the first has fetched the others find."""
    require("lm_eval", "eval", "evaluation on tasks")
    from tunesmith.eval.tasks import load_tasks

    loaded: list[Any] = []
    for is_turn in (ranks.is_main, not ranks.is_main):
        arguments = (config.tasks, config.include_path, config.confirm_run_unsafe_code)
        ranks.on_all(lambda: loaded.append(load_tasks(*arguments)) if is_turn else None)  # noqa: B023
    return loaded[0]


@contextlib.contextmanager
def _quiet(is_shown: bool) -> Iterator[None]:
    """Without the bars of ranks other than the main one, which would be drawn over each other, and any that no terminal shows."""
    stream = WithoutBars(sys.stderr) if is_shown else io.StringIO()
    with contextlib.nullcontext() if is_shown and sys.stderr.isatty() else contextlib.redirect_stderr(stream):
        yield


def _subjects(config: Evaluate) -> list[Subject]:
    """`model` first. The adapter and the tokenizer's folder that the config names are its own."""
    name = f"{config.model} with {config.adapter}" if config.adapter else config.model
    others = dataclasses.replace(config.tokenizer, path=None)
    first = Subject(name, config.model, config.adapter, config.tokenizer)
    return [first, *(Subject(other, other, None, others) for other in config.compared)]


# --- one model ---------------------------------------------------------------------------------------


def _evaluate(config: Evaluate, subject: Subject, mesh: Mesh, tasks: Any, texts: dict[str, list[str]]) -> Evaluated:
    model, tokenizer = _load(config, subject, mesh)
    replicas = Replicas(mesh)
    started, outcome = time.perf_counter(), Evaluated(subject.name)
    length = _length(config, subject.name, model)
    if tasks is not None:
        _run_tasks(config, outcome, model, tokenizer, length, replicas, tasks)
    for file, of_file in texts.items():
        scored = score_file(model, tokenizer, file, of_file, length, config.stride, config.batch_tokens, replicas)
        outcome.texts.append(scored)
    outcome.seconds = time.perf_counter() - started
    del model
    gc.collect()  # before the next one is loaded
    return outcome


def _load(config: Evaluate, subject: Subject, mesh: Mesh) -> tuple[CausalLM, Tokenizer]:
    arguments = {"adapter": subject.adapter, "quantize_base": config.quantize_base, "mesh": mesh}
    model = load_model(subject.model, dtype=DTYPES[config.dtype], device=mesh.device, **arguments)
    templates = model.family.chat_templates if config.apply_chat_template else ()
    tokenizer = find_tokenizer(subject.tokenizer, tokenizer_folder(subject.model, subject.adapter), templates)
    if config.apply_chat_template and tokenizer.chat_template is None:
        raise UserError(
            f"`apply_chat_template`: {subject.name} has no chat template; name one in `tokenizer.chat_template`"
        )
    return model, tokenizer


def _length(config: Evaluate, name: str, model: CausalLM) -> int:
    """Tokens that the model may read."""
    most = model.config.context_length
    if config.max_length is not None and config.max_length > most:
        raise UserError(f"`max_length`: {name} can read {most} tokens, not {config.max_length}")
    return config.max_length or model.config.max_position_embeddings


def _run_tasks(
    config: Evaluate,
    outcome: Evaluated,
    model: CausalLM,
    tokenizer: Tokenizer,
    length: int,
    replicas: Replicas,
    tasks: Any,
) -> None:
    from tunesmith.eval.harness import Files, run_tasks
    from tunesmith.eval.lm import EngineLM

    assert config.seed is not None
    sizes = {"max_length": length, "batch_tokens": config.batch_tokens, "batch_size": config.batch_size}
    lm = EngineLM(model, tokenizer, outcome.name, replicas, seed=config.seed, **sizes)
    folder = _folder(config)
    files = Files(folder, lm, config) if folder is not None and replicas.is_main else None
    outcome.results = run_tasks(lm, tasks, config)
    outcome.num_truncated = lm.num_truncated
    if files is not None:
        print(f"wrote {files.write(outcome.results)}", file=sys.stderr)


# --- all of them -------------------------------------------------------------------------------------


def _tell(config: Evaluate, device: torch.device, models: list[Evaluated], tasks: Any) -> None:
    """Tables on the terminal, and files."""
    tables, differences = _tables(models, tasks)
    for table in tables:
        print_table(table, sys.stdout)
    for model in models:
        if model.num_truncated:
            print(
                f"{model.name}: requests longer than its context, which lost their beginning: {model.num_truncated}",
                file=sys.stderr,
            )
    if (folder := _folder(config)) is not None:
        _write_json(folder / "perplexity.json", {model.name: [text.row() for text in model.texts] for model in models})
        _write_json(folder / "comparison.json", [one.row() for one in differences])
        facts = [device_name(device), config.dtype, *(f"{model.name}: {_facts(model)}" for model in models)]
        title = ", ".join(model.name for model in models)
        report = write_report(folder, title, facts, tables, models[0].results, dump(config))
        print(f"wrote {report}", file=sys.stderr)


def _tables(models: list[Evaluated], tasks: Any) -> tuple[list[Table], list[Difference]]:
    tables = []
    for model in models:
        tables += [task_table(model.name, model.results)] if model.results is not None else []
        tables += [text_table(model.name, model.texts)] if model.texts else []
    first, *others = models
    differences: list[Difference] = []
    for other in others:
        own = _differences(first, other, tasks)
        tables.append(difference_table(first.name, other.name, own))
        differences += own
    return tables, differences


def _differences(first: Evaluated, other: Evaluated, tasks: Any) -> list[Difference]:
    found = [compare_texts(a, b, other.name) for a, b in zip(first.texts, other.texts, strict=True)]
    if first.results is None or other.results is None:
        return found
    from tunesmith.eval.harness import aggregation

    return compare_tasks(first.results, other.results, other.name, lambda *key: aggregation(tasks, *key)) + found


def _folder(config: Evaluate) -> Path | None:
    """Where files go."""
    return Path(config.output_dir).expanduser() if config.output_dir else None


def _facts(model: Evaluated) -> str:
    cut = f", {model.num_truncated} requests cut to its context" if model.num_truncated else ""
    return f"{format_seconds(model.seconds)}{cut}"


def _write_json(path: Path, content: Any) -> None:
    """Where there is something to tell."""
    if any(content.values() if isinstance(content, dict) else content):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
