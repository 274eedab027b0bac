"""Evaluation: scores on tasks, perplexity of texts, models side by side.

tune run evaluate model=run/checkpoints/latest 'tasks=[hellaswag, gsm8k]' limit=100
tune run evaluate model=Qwen/Qwen3-0.6B 'tasks=[./my_task.yaml]' apply_chat_template=true
tune run evaluate model=run/checkpoints/latest compare=Qwen/Qwen3-0.6B 'tasks=[arc_easy]' perplexity=book.txt
tune run --nproc_per_node 2 evaluate model=… 'tasks=[mmlu]'                 each process has the model, and answers its share
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.configs.evaluate import Evaluate
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import UserError, require
from tunesmith.eval.texts import TextScore, read_texts, score_file
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.device import pick_device, supports_bf16
from tunesmith.parallel.mesh import Ranks, start_mesh, stop_mesh
from tunesmith.training.build import DTYPES, load_model, tokenizer_folder
from tunesmith.training.preflight import check


@dataclass
class Evaluated:
    """What became of one model."""

    name: str
    results: dict[str, Any] | None = None
    """The harness's."""
    texts: list[TextScore] = field(default_factory=list)
    num_truncated: int = 0
    seconds: float = 0.0


def main(config: Evaluate) -> None:
    check(config)
    device = pick_device(config.device)
    if config.dtype == "bf16" and not supports_bf16(device):
        raise UserError(f"{device} has no bf16: use `dtype: fp16` or `dtype: fp32`")
    ranks = start_mesh(device).ranks if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Ranks()
    texts = {file: read_texts(file) for file in config.text_files}
    tasks = _load_tasks(config, ranks) if config.tasks else None
    evaluated = [
        _evaluate(config, name, config.adapter if name == config.model else None, device, ranks, tasks, texts)
        for name in [config.model, *config.compared]
    ]
    print(evaluated)
    stop_mesh()


def _load_tasks(config: Evaluate, ranks: Ranks) -> Any:
    """Ranks read data one after the other: what the first has fetched the others find."""
    if not (sys.stderr.isatty() and ranks.is_main):
        os.environ.setdefault("TQDM_DISABLE", "1")
    require("lm_eval", "eval", "evaluation on tasks")
    from tunesmith.eval.tasks import load_tasks

    def load() -> Any:
        return load_tasks(config.tasks, config.include_path, config.confirm_run_unsafe_code)

    loaded: list[Any] = []
    ranks.on_all(lambda: loaded.append(load()) if ranks.is_main else None)
    ranks.on_all(lambda: None if ranks.is_main else loaded.append(load()))
    return loaded[0]


def _evaluate(
    config: Evaluate,
    name: str,
    adapter: str | None,
    device: torch.device,
    ranks: Ranks,
    tasks: Any,
    texts: dict[str, list[str]],
) -> Evaluated:
    model, tokenizer = _load(config, name, adapter, device)
    started = time.perf_counter()
    outcome = Evaluated(name)
    length = config.max_length or model.config.max_position_embeddings
    if tasks is not None:
        from tunesmith.eval.harness import run_tasks
        from tunesmith.eval.lm import EngineLM

        lm = EngineLM(model, tokenizer, name, ranks, max_length=length, batch_tokens=config.batch_tokens)
        outcome.results, outcome.num_truncated = run_tasks(lm, tasks, config), lm.num_truncated
    for file, of_file in texts.items():
        scored = score_file(model, tokenizer, file, of_file, length, config.stride, config.batch_tokens, ranks)
        outcome.texts.append(scored)
    outcome.seconds = time.perf_counter() - started
    del model
    gc.collect()
    return outcome


def _load(config: Evaluate, name: str, adapter: str | None, device: torch.device) -> tuple[CausalLM, Tokenizer]:
    model = load_model(
        name, dtype=DTYPES[config.dtype], device=device, adapter=adapter, quantize_base=config.quantize_base
    )
    templates = model.family.chat_templates if config.apply_chat_template else ()
    settings = config.tokenizer if name == config.model else dataclasses.replace(config.tokenizer, path=None)
    tokenizer = find_tokenizer(settings, tokenizer_folder(name, adapter), templates)
    if config.apply_chat_template and tokenizer.chat_template is None:
        raise UserError(f"`apply_chat_template`: {name} has no chat template; name one in `tokenizer.chat_template`")
    return model, tokenizer
