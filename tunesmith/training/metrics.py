"""metrics.jsonl, which every run writes, and the loggers that may get the same numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import sys
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tunesmith.configs import shared
from tunesmith.errors import UserError, require


class Logger(Protocol):
    """What a metric logger offers, ours or a third party's."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes each logged step to `folder`/metrics.jsonl and passes it on to the logger that `config.metric_logger` names.

    On a resume from the checkpoint of step `resume_step`, lines of later steps (and a line torn by a crash) are removed first; without one the file starts empty.
    With `enabled` false (every rank but the main one) nothing is written.
    """

    def __init__(self, folder: Path, config: Any, total_steps: int | None = None, resume_step: int | None = None, enabled: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        self._file = self._logger = None
        if not enabled:
            return
        self._logger = build_logger(Path(folder), config, total_steps, resume_step or 0)
        _keep_steps(self.path, resume_step or 0)
        self._file = open(self.path, "ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line: `step` and the named `values` (numbers, 0-dimensional tensors or texts; NaN and infinities become null)."""
        if self._file is None:
            return
        row = {"step": int(step), **{name: _plain(value) for name, value in values.items()}}
        line = json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}, allow_nan=False)
        try:
            self._file.write(line.encode() + b"\n")  # one unbuffered write: a kill leaves the whole line or none of it
        except OSError as error:
            raise UserError(f"{self.path} could not be written ({error.strerror}): make room or choose another output_dir, then resume") from error
        numbers = {name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        if self._logger is not None:
            self._pass_on(int(step), numbers)

    def sync(self) -> None:
        """Force the lines written so far to the disk, so that they outlive a power cut as a checkpoint does."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the logger; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def _pass_on(self, step: int, numbers: dict[str, float]) -> None:
        """A logger that fails (a server gone away, say) is reported and dropped; training goes on, metrics.jsonl has everything."""
        assert self._logger is not None
        try:
            self._logger.log(step, numbers)
        except Exception:
            traceback.print_exc()
            print(f"the metric logger {type(self._logger).__name__} failed and is switched off; {self.path} has every number", file=sys.stderr)
            self._logger = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a last line that a crash tore is left out, no file is no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _keep_steps(path: Path, last_step: int) -> None:
    """Rewrite the file, atomically, with the whole lines of steps up to `last_step`."""
    kept = [line + b"\n" for line in (path.read_bytes().split(b"\n")[:-1] if path.exists() else []) if _step_of(line) <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf  # not one of our lines: torn


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


# --- loggers -------------------------------------------------------------------------------------


def build_logger(folder: Path, config: Any, total_steps: int | None, resume_step: int) -> Logger | None:
    """The logger that `config.metric_logger` asks for, None for metrics.jsonl alone. Raises MissingExtra without its package."""
    section = config.metric_logger
    if isinstance(section, shared.Disk):
        return None
    if isinstance(section, shared.ThirdPartyLogger):
        return _find_class(section.type)(folder, config, **section.options)
    settings = {**flatten(config), "total_steps": total_steps}
    kinds = {shared.TensorBoard: TensorBoardLogger, shared.WandB: WandBLogger, shared.Comet: CometLogger, shared.MLflow: MLflowLogger}
    return kinds[type(section)](folder, section, settings, resume_step)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as one level of dotted keys, the `type` of each section included."""
    flat: dict[str, Any] = {}
    for name in (["type"] if isinstance(vars(type(config)).get("type"), str) else []) + [field.name for field in dataclasses.fields(config)]:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float | bool | None) else json.dumps(value, default=dataclasses.asdict)
    return flat


def _find_class(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"metric_logger.type: {dotted} can't be imported ({error}): give the dotted path of a class that is installed") from error


def _run_id(folder: Path, service: str, resume_step: int, make: Any = lambda: uuid.uuid4().hex) -> tuple[str, bool]:
    """The id under which `service` knows this run, and whether it was there before: kept in logger_runs.json so that a resumed run goes on in the same curve."""
    path = folder / "logger_runs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if resume_step and service in known:
        return known[service], True
    known[service] = make()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(known) + "\n")
    os.replace(temporary, path)
    return known[service], False


class TensorBoardLogger:
    """Event files for TensorBoard; a resume hides the points after the checkpoint."""

    def __init__(self, folder: Path, section: shared.TensorBoard, settings: dict[str, Any], resume_step: int):
        require("tensorboard", "tensorboard", "metric_logger.type=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(section.log_dir or str(folder / "tensorboard"), purge_step=resume_step + 1)
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandBLogger:
    """A Weights & Biases run; its x axis is the optimizer step."""

    def __init__(self, folder: Path, section: shared.WandB, settings: dict[str, Any], resume_step: int):
        wandb = require("wandb", "wandb", "metric_logger.type=wandb")
        run_id, _ = _run_id(folder, "wandb", resume_step)
        name = section.name or folder.resolve().name
        mode = section.mode or os.environ.get("WANDB_MODE") or "online"
        try:
            self._run = wandb.init(
                project=section.project, entity=section.entity, group=section.group, name=name, mode=mode, id=run_id, dir=str(folder), config=settings, resume="allow" if mode == "online" else None
            )
        except wandb.errors.Error as error:
            raise UserError(f"Weights & Biases could not start the run ({error}): log in with `wandb login`, or set metric_logger.mode=offline") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class CometLogger:
    """A Comet experiment; offline it becomes an archive in comet/ of the run folder."""

    def __init__(self, folder: Path, section: shared.Comet, settings: dict[str, Any], resume_step: int):
        comet = require("comet_ml", "comet", "metric_logger.type=comet")
        key, is_known = _run_id(folder, "comet", resume_step)
        options = comet.ExperimentConfig(
            log_code=False, log_graph=False, parse_args=False, auto_output_logging=False, auto_metric_logging=False, auto_param_logging=False, log_git_patch=False,
            display_summary_level=0, offline_directory=str(folder / "comet"), name=section.experiment_name or folder.resolve().name,
        )  # fmt: skip
        mode = "get" if is_known and not section.offline else "create"
        try:
            self._experiment = comet.start(project=section.project, workspace=section.workspace, experiment_key=key, mode=mode, online=not section.offline, experiment_config=options)
        except (ValueError, comet.exceptions.CometException) as error:
            raise UserError(f"Comet could not start the experiment ({error}): set COMET_API_KEY, or metric_logger.offline=true") from error
        self._experiment.log_parameters(settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._experiment.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._experiment.end()


class MLflowLogger:
    """An MLflow run on a server, in a database or in a folder."""

    def __init__(self, folder: Path, section: shared.MLflow, settings: dict[str, Any], resume_step: int):
        mlflow = require("mlflow", "mlflow", "metric_logger.type=mlflow")
        self._entities = require("mlflow.entities", "mlflow", "metric_logger.type=mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=section.tracking_uri)
        self._run_id, is_known = _run_id(folder, "mlflow", resume_step, lambda: self._create_run(section, section.run_name or folder.resolve().name))
        if is_known:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.log_batch(self._run_id, params=[self._entities.Param(name, str(value)[:500]) for name, value in settings.items()])

    def _create_run(self, section: shared.MLflow, name: str) -> str:
        experiment = self._client.get_experiment_by_name(section.experiment_name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(section.experiment_name)
        return self._client.create_run(experiment_id, run_name=name).info.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[self._entities.Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
