"""One model through the harness: questions asked, answers scored, results in the harness's own form. Imports lm_eval, which takes seconds."""

from __future__ import annotations

import contextlib
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path

from tunesmith.configs.evaluate import Evaluate
from tunesmith.errors import UserError
from tunesmith.eval.lm import EngineLM
from tunesmith.eval.tasks import Loaded, in_words

BOOTSTRAPS = 100_000
"""The harness's own number, for standard errors of what is no mean."""
_PYTHON_SEED = 0
"""The harness's own, for the few tasks that draw by Python's generator."""

Results = dict[str, Any]


def prepare(loaded: Loaded, config: Evaluate) -> None:
    """Give the tasks the settings that go before their own. To be called before each model: examples are drawn anew."""
    random.seed(_PYTHON_SEED)
    numpy.random.seed((config.seed or 0) % 2**32)
    torch.manual_seed(config.seed or 0)
    for task in loaded["tasks"].values():
        if config.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(config.gen_kwargs), update=True)
        own = task.get_config("num_fewshot")
        if own is None:
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        elif own != 0 and config.num_fewshot is not None:  # a task that says 0 has no examples to give
            task.set_config(key="num_fewshot", value=config.num_fewshot)
        task.set_fewshot_seed(seed=config.fewshot_seed)


def run_tasks(lm: EngineLM, loaded: Loaded, config: Evaluate) -> Results:
    """The harness's results, with all samples; to be called on every rank, the main rank's are whole.

    Raises UserError for what a task asks that the model cannot do.
    """
    started = time.time()
    prepare(loaded, config)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for our tables
            results = evaluate(
                lm=lm,
                task_dict=loaded,  # type: ignore[arg-type]
                limit=config.limit,  # type: ignore[arg-type]
                bootstrap_iters=BOOTSTRAPS if lm.replicas.is_main else 0,
                log_samples=True,
                system_instruction=config.system_instruction,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=config.fewshot_as_multiturn,
                confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            )
    except Exception as error:
        if isinstance(error, UserError) or _is_ours(error):
            raise
        raise UserError(f"`tasks`: {_in_words(error)}") from error
    assert results is not None
    return {**results, **_about(lm, config, started)}


def _is_ours(error: Exception) -> bool:
    """Whether it comes from below a call of our engine by the harness, not from a task."""
    package = Path(__file__).parents[1]
    _, *below = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(Path(file).is_relative_to(package) for file in below)


def _in_words(error: Exception) -> str:
    """What a task, its data or a function of its own has done."""
    if "did not find any docs" in str(error):
        return "a task has no examples; is its data file empty, or its split misspelled?"
    if "Sample larger than population" in str(error):
        return "a task has fewer solved examples than are to stand before a question: lower `num_fewshot`"
    return f"one of them can't be asked or scored: {in_words(error)}"


def aggregation(loaded: Loaded, task: str, metric: str) -> Callable[[list[Any]], float] | None:
    """What makes one number of a task's examples; None: their mean."""
    of_task = loaded["tasks"][task].aggregation().get(metric, mean)
    return None if of_task is mean else of_task


def _about(lm: EngineLM, config: Evaluate, started: float) -> Results:
    """How the results came about, under the harness's keys."""
    tokenizer, tokens = lm.engine_tokenizer, lm.engine_tokenizer.tokens
    arguments = {"pretrained": lm.name, "dtype": config.dtype, "peft": config.adapter}
    return {
        "config": {
            "model": "tunesmith",
            "model_args": {name: value for name, value in arguments.items() if value is not None},
            **lm.get_model_info(),
            "batch_size": config.batch_size,
            "batch_sizes": [],
            "device": str(lm.device),
            "use_cache": None,
            "limit": config.limit,
            "bootstrap_iters": BOOTSTRAPS,
            "gen_kwargs": config.gen_kwargs or None,
            "random_seed": _PYTHON_SEED,
            "numpy_seed": config.seed,
            "torch_seed": config.seed,
            "fewshot_seed": config.fewshot_seed,
        },
        "git_hash": get_commit_from_path(Path.cwd()),
        "date": started,
        "pretty_env_info": f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}",
        "transformers_version": version("transformers"),
        "lm_eval_version": version("lm_eval"),
        "tunesmith_version": version("tunesmith"),
        "upper_git_hash": None,
        "tokenizer_pad_token": [tokens.get("pad_token"), str(tokenizer.pad_id)],
        "tokenizer_eos_token": [tokens.get("eos_token"), str(tokenizer.eos_id)],
        "tokenizer_bos_token": [tokens.get("bos_token"), str(tokenizer.bos_id)],
        "eot_token_id": lm.eot_token_id,
        "max_length": lm.max_length,
        "truncated_requests": lm.num_truncated,
    }


class Files:
    """Writes results as the harness does: OUTPUT/MODEL/results_DATE.json and, if asked for, samples_TASK_DATE.jsonl."""

    def __init__(self, folder: Path, lm: EngineLM, config: Evaluate):
        """To be made before the evaluation begins: it measures how long that takes."""
        self.tracker = EvaluationTracker(output_path=str(folder))
        self.folder, self.with_samples = folder, config.log_samples
        self.tracker.general_config_tracker.log_experiment_args(
            model_source="tunesmith",
            model_args={"pretrained": lm.name},
            system_instruction=config.system_instruction,
            chat_template=lm.chat_template(config.apply_chat_template),
            fewshot_as_multiturn=config.fewshot_as_multiturn,
        )

    def write(self, results: Results) -> Path:
        """The results' file. Raises UserError where it could not be written."""
        samples = results["samples"] if self.with_samples else {}
        table = {key: value for key, value in results.items() if key != "samples"}
        self.tracker.save_results_aggregated(results=table, samples=samples)  # it only warns of what goes wrong
        folder = self.folder / str(self.tracker.general_config_tracker.model_name_sanitized)
        file = folder / f"results_{getattr(self.tracker, 'date_id', '')}.json"
        if not file.is_file():
            raise UserError(f"`output_dir`: the results could not be written to {folder}: is there room, and access?")
        for name, rows in samples.items():
            self.tracker.save_results_samples(name, [dict(row) for row in rows])  # type: ignore[arg-type]
        return file
