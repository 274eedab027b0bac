"""Where metrics go besides metrics.jsonl."""

from dataclasses import field
from typing import Any, ClassVar, Literal

from tunesmith.configs._section import section


@section
class Disk:
    """metrics.jsonl in the run folder, and nothing else."""

    type: ClassVar[str] = "disk"


@section
class TensorBoard:
    """TensorBoard event files beside metrics.jsonl."""

    type: ClassVar[str] = "tensorboard"
    log_dir: str | None = None
    """Where the event files go; default: tensorboard/ in the run folder."""


@section
class WandB:
    """Weights & Biases beside metrics.jsonl."""

    type: ClassVar[str] = "wandb"
    project: str = "tunesmith"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; default: your own."""
    group: str | None = None
    """Groups runs in the interface."""
    name: str | None = None
    """Name of the run; default: the output folder's."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """Default: what WANDB_MODE says, else online."""


@section
class Comet:
    """Comet beside metrics.jsonl."""

    type: ClassVar[str] = "comet"
    project: str = "tunesmith"
    """Project that the experiment appears in."""
    workspace: str | None = None
    """Workspace; default: your own."""
    experiment_name: str | None = None
    """Name of the experiment; default: the output folder's."""
    offline: bool = False
    """Write an archive to upload later instead of sending."""


@section
class MLflow:
    """MLflow beside metrics.jsonl."""

    type: ClassVar[str] = "mlflow"
    experiment_name: str = "tunesmith"
    """Experiment that the run appears in."""
    tracking_uri: str | None = None
    """Server, database or folder; default: what MLFLOW_TRACKING_URI says, else mlflow.db in the run folder."""
    run_name: str | None = None
    """Name of the run; default: the output folder's."""


@section
class ThirdPartyLogger:
    """Any class by its dotted path, called with (run_folder, config, **options); needs log(step, metrics) and close()."""

    type: str
    """Dotted path of the class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class."""


MetricLogger = Disk | TensorBoard | WandB | Comet | MLflow | ThirdPartyLogger
