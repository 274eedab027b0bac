"""metrics.jsonl survives kills and resumes; every logger gets the numbers, offline."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch

from tunesmith.configs import loggers, optimizers
from tunesmith.errors import MissingExtra, UserError
from tunesmith.training.loggers import flatten
from tunesmith.training.metrics import Metrics, read_metrics


@dataclass
class Config:
    """As much of a training config as the loggers look at."""

    metric_logger: loggers.MetricLogger = field(default_factory=loggers.Disk)
    optimizer: optimizers.Optimizer = field(default_factory=optimizers.AdamW)
    seed: int = 1


def strict_rows(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(folder, first, last, resume_step=None, config=None):
    metrics = Metrics(folder, config or Config(), total_steps=10, resume_step=resume_step)
    for step in range(first, last + 1):
        metrics.log(step, {"loss": 10.0 / step, "lr": 1e-3})
    metrics.close()


def test_lines_are_strict_json_whatever_the_values_are(tmp_path):
    metrics = Metrics(tmp_path, Config(), 3)
    metrics.log(
        1,
        {
            "loss": float("nan"),
            "grad_norm": torch.tensor(float("inf")),
            "num_tokens": torch.tensor(7),
            "lr": 0.1,
            "note": "a\nb",
        },
    )
    metrics.close()
    metrics.close()
    assert strict_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "grad_norm": None, "num_tokens": 7, "lr": 0.1, "note": "a\nb"}
    ]


def test_numbers_come_back_to_the_last_bit(tmp_path):
    metrics = Metrics(tmp_path, Config(), 1)
    value = torch.rand((), dtype=torch.float32)
    metrics.log(1, {"loss": value})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == value.item()


def test_resume_leaves_neither_gap_nor_repeat(tmp_path):
    write_steps(tmp_path, 1, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')
    write_steps(tmp_path, 5, 10, resume_step=4)
    resumed = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "whole").mkdir()
    write_steps(tmp_path / "whole", 1, 10)
    assert resumed == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_start_afresh_empties_the_file(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 1, 2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_outlive_sigkill(tmp_path):
    code = """
import sys
from types import SimpleNamespace
from pathlib import Path
from tunesmith.configs.loggers import Disk
from tunesmith.training.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), SimpleNamespace(metric_logger=Disk()))
for step in range(1, 10**9):
    metrics.log(step, {"loss": 1 / step})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    last_told = int((["1"] + [line for line in process.stdout.read().split("\n") if line])[-1])
    process.wait()
    process.stdout.close()
    steps = [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last_told


def test_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, Config(loggers.TensorBoard()), 1, enabled=False)
    metrics.log(1, {"loss": 1.0})
    metrics.sync()
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_user_error(tmp_path):
    metrics = Metrics(tmp_path, Config(), 1)
    metrics._file.close()
    metrics._file = open("/dev/full", "wb", buffering=0)
    with pytest.raises(UserError, match="could not be written .No space left"):
        metrics.log(1, {"loss": 1.0})
    metrics.close()


def test_flat_settings_name_the_type_of_each_section():
    settings = flatten(Config())
    assert (
        settings["optimizer.type"] == "adamw"
        and settings["optimizer.betas"] == "[0.9, 0.999]"
        and settings["seed"] == 1
    )


def test_tensorboard_events_read_back_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config(loggers.TensorBoard())
    write_steps(tmp_path, 1, 4, config=config)
    write_steps(tmp_path, 3, 5, resume_step=2, config=config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("loss")[1].value == 5.0


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_steps(tmp_path, 1, 3, config=Config(loggers.WandB(mode="offline")))
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    give_up = time.monotonic() + 60
    while b"loss" not in files[0].read_bytes():  # another process writes it, in its own time
        assert time.monotonic() < give_up, "the metrics never reached the file"
        time.sleep(0.1)
    assert json.loads((tmp_path / "logger_runs.json").read_text())["wandb"] in files[0].name


@pytest.mark.filterwarnings("ignore")  # Comet leaves a socket to the garbage collector
def test_comet_offline(tmp_path, monkeypatch):
    import gc
    import zipfile

    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "ERROR")
    write_steps(tmp_path, 1, 3, config=Config(loggers.Comet(offline=True)))
    (archive,) = (tmp_path / "comet").glob("*.zip")
    messages = zipfile.ZipFile(archive).read("messages.json").decode()
    gc.collect()
    assert '"loss"' in messages and '"optimizer.lr"' in messages


@pytest.mark.filterwarnings("ignore")  # MLflow uses deprecated parts of SQLAlchemy
def test_mlflow_in_a_database_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path}/mlflow.db"
    config = Config(loggers.MLflow(tracking_uri=address))
    write_steps(tmp_path, 1, 3, config=config)
    write_steps(tmp_path, 4, 5, resume_step=3, config=config)
    client = MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5]
    assert run.data.params["optimizer.type"] == "adamw" and run.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
def test_mlflow_without_an_address_writes_into_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write_steps(tmp_path / "run", 1, 1, config=Config(loggers.MLflow()))
    assert (tmp_path / "run/mlflow.db").is_file() and [path.name for path in tmp_path.iterdir()] == ["run"]


class Recorder:
    """A third party's logger."""

    made = []

    def __init__(self, folder, config, **options):
        self.folder, self.options, self.rows = folder, options, []
        Recorder.made.append(self)

    def log(self, step, metrics):
        if metrics["loss"] < self.options.get("fails_below", 0):
            raise ConnectionError("gone")
        self.rows.append((step, metrics))

    def close(self):
        self.rows.append("closed")


def test_third_party_class_by_dotted_path(tmp_path):
    write_steps(tmp_path, 1, 2, config=Config(loggers.ThirdPartyLogger(f"{__name__}.Recorder", {"color": "red"})))
    recorder = Recorder.made.pop()
    assert recorder.options == {"color": "red"} and recorder.folder == tmp_path
    assert recorder.rows == [(1, {"loss": 10.0, "lr": 1e-3}), (2, {"loss": 5.0, "lr": 1e-3}), "closed"]


def test_a_failing_logger_is_reported_and_the_run_goes_on(tmp_path, capsys):
    write_steps(tmp_path, 1, 5, config=Config(loggers.ThirdPartyLogger(f"{__name__}.Recorder", {"fails_below": 3})))
    assert len(Recorder.made.pop().rows) == 3 and len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert "Recorder failed and is switched off" in capsys.readouterr().err


@pytest.mark.parametrize("dotted", ["nowhere.Logger", "json.Logger", "Logger"])
def test_unknown_class_is_a_user_error(tmp_path, dotted):
    with pytest.raises(UserError, match=f"metric_logger.type: {dotted} can't be imported"):
        write_steps(tmp_path, 1, 1, config=Config(loggers.ThirdPartyLogger(dotted)))


@pytest.mark.parametrize(
    "section, package",
    [
        (loggers.TensorBoard(), "tensorboard"),
        (loggers.WandB(), "wandb"),
        (loggers.Comet(), "comet_ml"),
        (loggers.MLflow(), "mlflow"),
    ],
)
def test_absent_package_is_named(tmp_path, monkeypatch, section, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f"metric_logger.type={section.type} needs the package {package}.*tunesmith"):
        Metrics(tmp_path, Config(section))
