"""The loggers that may get a run's numbers besides metrics.jsonl: TensorBoard, Weights & Biases, Comet, MLflow, or a third party's class."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from tunesmith.configs import loggers as sections
from tunesmith.errors import UserError, require


class Logger(Protocol):
    """What a metric logger offers, ours or a third party's."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def build_logger(folder: Path, config: Any, total_steps: int | None, resume_step: int) -> Logger | None:
    """The logger that `config.metric_logger` asks for, None for metrics.jsonl alone. Raises MissingExtra without its package."""
    section = config.metric_logger
    if isinstance(section, sections.Disk):
        return None
    if isinstance(section, sections.ThirdPartyLogger):
        return _find_class(section.type)(folder, config, **section.options)
    settings = {**flatten(config), "total_steps": total_steps}
    kinds = {
        sections.TensorBoard: TensorBoardLogger,
        sections.WandB: WandBLogger,
        sections.Comet: CometLogger,
        sections.MLflow: MLflowLogger,
    }
    return kinds[type(section)](folder, section, settings, resume_step)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as one level of dotted keys, the `type` of each section included."""
    flat: dict[str, Any] = {}
    for name in (["type"] if isinstance(vars(type(config)).get("type"), str) else []) + [
        field.name for field in dataclasses.fields(config)
    ]:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = (
                value
                if isinstance(value, str | int | float | bool | None)
                else json.dumps(value, default=dataclasses.asdict)
            )
    return flat


def _find_class(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"metric_logger.type: {dotted} can't be imported ({error}): give the dotted path of a class that is installed"
        ) from error


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

    def __init__(self, folder: Path, section: sections.TensorBoard, settings: dict[str, Any], resume_step: int):
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

    def __init__(self, folder: Path, section: sections.WandB, settings: dict[str, Any], resume_step: int):
        wandb = require("wandb", "wandb", "metric_logger.type=wandb")
        run_id, _ = _run_id(folder, "wandb", resume_step)
        name = section.name or folder.resolve().name
        mode = section.mode or os.environ.get("WANDB_MODE") or "online"
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                group=section.group,
                name=name,
                mode=mode,
                id=run_id,
                dir=str(folder),
                config=settings,
                resume="allow" if mode == "online" else None,
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases could not start the run ({error}): log in with `wandb login`, or set metric_logger.mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class CometLogger:
    """A Comet experiment; offline it becomes an archive in comet/ of the run folder."""

    def __init__(self, folder: Path, section: sections.Comet, settings: dict[str, Any], resume_step: int):
        comet = require("comet_ml", "comet", "metric_logger.type=comet")
        key, is_known = _run_id(folder, "comet", resume_step)
        options = comet.ExperimentConfig(
            log_code=False, log_graph=False, parse_args=False, auto_output_logging=False, auto_metric_logging=False, auto_param_logging=False, log_git_patch=False,
            display_summary_level=0, offline_directory=str(folder / "comet"), name=section.experiment_name or folder.resolve().name,
        )  # fmt: skip
        mode = "get" if is_known and not section.offline else "create"
        try:
            self._experiment = comet.start(
                project=section.project,
                workspace=section.workspace,
                experiment_key=key,
                mode=mode,
                online=not section.offline,
                experiment_config=options,
            )
        except (ValueError, comet.exceptions.CometException) as error:
            raise UserError(
                f"Comet could not start the experiment ({error}): set COMET_API_KEY, or metric_logger.offline=true"
            ) from error
        self._experiment.log_parameters(settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._experiment.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._experiment.end()


class MLflowLogger:
    """An MLflow run on a server, in a database or in a folder."""

    def __init__(self, folder: Path, section: sections.MLflow, settings: dict[str, Any], resume_step: int):
        mlflow = require("mlflow", "mlflow", "metric_logger.type=mlflow")
        self._entities = require("mlflow.entities", "mlflow", "metric_logger.type=mlflow")
        own = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        uri = section.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._run_id, is_known = _run_id(
            folder, "mlflow", resume_step, lambda: self._create_run(section, section.run_name or folder.resolve().name)
        )
        if is_known:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.log_batch(
                self._run_id, params=[self._entities.Param(name, str(value)[:500]) for name, value in settings.items()]
            )

    def _create_run(self, section: sections.MLflow, name: str) -> str:
        experiment = self._client.get_experiment_by_name(section.experiment_name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(section.experiment_name)
        )
        return self._client.create_run(experiment_id, run_name=name).info.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
