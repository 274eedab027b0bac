"""Where and with what a run works: output folder, processes, layout, packages. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.configs.evaluate import Evaluate
from tunesmith.configs.export import Export
from tunesmith.configs.layout import Layout, rows_problem
from tunesmith.configs.quantize import Quantize
from tunesmith.configs.shared import TOO_EARLY, TrainSettings
from tunesmith.configs.stages import micro_batch_problems
from tunesmith.errors import UserError
from tunesmith.remote import is_remote, missing_package, working_folder
from tunesmith.training.preflight.files import option_of

if TYPE_CHECKING:
    pass


def is_restart() -> bool:
    """Whether torchrun started this process again, after one of the run's processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def output_problems(config: Any, notes: list[str]) -> Iterator[str]:
    folder = getattr(config, "output_dir", None)
    if folder is None:
        return
    if is_remote(folder):
        yield from _remote_output(config, folder, notes)
        return
    path = Path(folder).expanduser()
    resumes = getattr(config, "resume_from_checkpoint", False) or is_restart()
    adds = isinstance(config, Evaluate)
    if path.exists() and not path.is_dir():
        yield f"`output_dir`: {folder} is a file"
    elif path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()) and not resumes and not adds:
        cure = (
            ", or set `resume_from_checkpoint=true` to go on from its newest checkpoint"
            if hasattr(config, "epochs")
            else ""
        )
        yield f"`output_dir`: {folder} is not empty; choose another{cure}"
    elif isinstance(config, Export | Quantize) and path.absolute() == Path.cwd():
        yield f"`output_dir`: {folder} is the current folder, whose place a new one would take; name another"
    else:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            yield f"`output_dir`: {folder} can't be written to"


def _remote_output(config: Any, url: str, notes: list[str]) -> Iterator[str]:
    if not hasattr(config, "epochs"):
        yield f"`output_dir`: {url} can't be written to directly; name a local or shared folder, and copy it there"
    elif problem := missing_package(url):
        yield f"`output_dir`: {problem}"
    else:
        notes.append(
            f"{url} is looked at when the run starts; the run works in {working_folder(url)}, and each checkpoint is copied there"
        )


def process_problems(config: Any, processes: int | None) -> Iterator[str]:
    """What the number of processes decides, as far as it is known."""
    known = int(os.environ.get("WORLD_SIZE") or 0) if processes is None else processes
    if not hasattr(config, "tensor_parallel_dim"):
        if (known > 1 or processes == 0) and isinstance(config, (Export, Quantize)):
            yield "`quantize` and `export` run in one process: leave the launch options out"
        return
    if known:
        try:
            _, replicas, shards, *_ = Layout.of(config).sizes(known)
        except UserError as error:
            yield str(error)
            return
    elif processes is None and isinstance(config, TrainSettings):
        # As many as the layout names, else one: the one that reads this.
        replicas, shards = config.data_parallel_replicate_dim, max(1, config.data_parallel_shard_dim)
    else:
        return
    if not isinstance(config, TrainSettings):
        return
    if config.data_parallel_shard_dim == -1 and shards > 1:
        yield from _adafactor_problem(
            config, f"`data_parallel_shard_dim: -1`, which is {shards} of the {known} processes"
        )
    if problem := rows_problem(config, replicas * shards):
        yield problem
        return
    micro_batches = (config.global_batch_size or 0) // (config.batch_size * replicas * shards)
    if config.optimizer_in_bwd and micro_batches > 1:
        yield (
            f"`optimizer_in_bwd` can't be combined with `global_batch_size: {config.global_batch_size}`, which makes {micro_batches} "
            f"micro-batches of `batch_size: {config.batch_size}`: {TOO_EARLY}; set `global_batch_size` to null"
        )
    if known and config.pipeline_parallel_dim > 1 and config.global_batch_size is not None:
        yield from micro_batch_problems(config, micro_batches)


def _adafactor_problem(config: Any, cut_by: str) -> Iterator[str]:
    if option_of(config, "optimizer", "type") == "adafactor":
        yield (
            f"`optimizer.type: adafactor` can't be combined with {cut_by}: it takes means over whole rows and columns, which no rank has "
            "where parameters are cut; use copies (`data_parallel_shard_dim: 1` with `data_parallel_replicate_dim`), or another optimizer"
        )


def layout_option_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """What of the layout the options alone tell."""
    if not hasattr(config, "sequence_parallel"):
        return
    if problem := Layout.of(config).length_problem(config.tokenizer.max_seq_len, config.sequence_parallel):
        yield problem
    if config.expert_parallel_dim > 1:
        yield "`expert_parallel_dim`: there are no experts in the models that are supported yet; leave it at 1"
    cutting = ("data_parallel_shard_dim", "context_parallel_dim", "tensor_parallel_dim")
    if cuts := [f"`{option}: {getattr(config, option)}`" for option in cutting if getattr(config, option) > 1]:
        yield from _adafactor_problem(config, " or ".join(cuts))
    if config.pipeline_parallel_dim > 1 and getattr(config, "sample_prompts", None):
        yield (
            f"`sample_prompts` can't be combined with `pipeline_parallel_dim: {config.pipeline_parallel_dim}`: text isn't generated "
            "through a pipeline of ranks yet; leave one of them out"
        )


_EXTRAS = {
    ("metric_logger", "tensorboard"): ("tensorboard", "tensorboard"),
    ("metric_logger", "wandb"): ("wandb", "wandb"),
    ("metric_logger", "comet"): ("comet_ml", "comet"),
    ("metric_logger", "mlflow"): ("mlflow", "mlflow"),
    ("optimizer", "adamw_8bit"): ("torchao", "torchao"),
}
"""{(section, type): (package, extra)}."""


def package_problems(config: Any, notes: list[str]) -> Iterator[str]:
    for section in ("optimizer", "metric_logger"):
        kind = option_of(config, section, "type")
        if kind is None:
            continue
        if (section, kind) in _EXTRAS:
            package, extra = _EXTRAS[section, kind]
            if importlib.util.find_spec(package) is None:
                yield f"`{section}.type: {kind}` needs the package {package}, which is not installed: pip install 'tunesmith[{extra}]'"
        elif "." in kind and not importable(kind):
            yield f"`{section}.type`: no module {kind.rpartition('.')[0]} can be imported; is its package installed?"


def importable(dotted: str) -> bool:
    """Whether the package of a dotted path is there; nothing is imported."""
    try:
        return importlib.util.find_spec(dotted.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
