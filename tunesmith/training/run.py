"""A run: its device, seeds, folder, metrics, progress, checkpoints and how it ends.

    with start_run(config, "sft") as run:
        …
        for step in run.steps(checkpoint.resume() + 1, total):
            run.log(step, train_step(…))
            run.save_if_due(step)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith.checkpoint import adapter as peft
from tunesmith.checkpoint.hf import stage_repository
from tunesmith.checkpoint.resume import Checkpoints, fingerprint_folder, newest_checkpoint
from tunesmith.config import dump_config
from tunesmith.configs.shared import LoRAWeights, TrainSettings
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.device import device_name, peak_memory_gib, pick_device, reset_peak_memory
from tunesmith.parallel.mesh import Mesh, start_mesh, stop_mesh
from tunesmith.training.build import Source
from tunesmith.training.metrics import Metrics
from tunesmith.training.preflight import check
from tunesmith.training.profile import profiler
from tunesmith.training.progress import Progress
from tunesmith.training.report import write_report
from tunesmith.training.step import StepStats

T = TypeVar("T")


class Run:
    """What a recipe's loop needs around it. Made by `start_run`."""

    def __init__(self, config: TrainSettings, recipe: str, mesh: Mesh, folder: Path):
        self.config, self.recipe, self.mesh, self.folder = config, recipe, mesh, folder
        self.device = mesh.device
        self.resume_from = newest_checkpoint(folder) if config.resume_from_checkpoint else None
        self._resumed_step = int(self.resume_from.name.removeprefix("step-")) if self.resume_from else None
        self._signal: int | None = None
        self._total = 0
        self._data_seconds = 0.0
        self._step_started = time.perf_counter()
        self._progress = Progress(None, enabled=mesh.is_main)
        self._metrics: Metrics | None = None
        self._checkpoints: Checkpoints | None = None
        self._check_saved: Callable[[Path], None] | None = None

    # --- the loop ------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """Resume if asked, then count the steps that are left, up to `total`; ends early, after a whole step, on SIGINT or SIGTERM."""
        assert self._checkpoints is not None, "call keep() first"
        self._total = total
        done = self._checkpoints.restore(self.resume_from) if self.resume_from else 0
        self._metrics = Metrics(self.folder, self.config, total, self._resumed_step, enabled=self.mesh.is_main)
        self._progress = Progress(total, enabled=self.mesh.is_main, done=done)
        if done:
            self.note(f"resumed after step {done} from {self.resume_from}")
        with profiler(self.config.profiler, self.folder) as trace, self._signals():
            for step in range(done + 1, total + 1):
                reset_peak_memory(self.device)
                self._step_started, self._data_seconds = time.perf_counter(), 0.0
                yield step
                trace.step()
                if self._signal is not None:
                    if self._checkpoints.last_saved != step:  # the signal came after the recipe's own look
                        self._checkpoints.save(step)
                    break

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the loop early."""
        return self._signal is not None

    def next(self, read: Callable[[int], T], step: int) -> T:
        """`read(step)`, its time counted as waiting for data."""
        started = time.perf_counter()
        result = read(step)
        self._data_seconds += time.perf_counter() - started
        return result

    def log(self, step: int, stats: StepStats, **more: float) -> None:
        """Log what a step did, and show it."""
        assert self._metrics is not None and self._checkpoints is not None
        counters = self._checkpoints.counters
        counters["num_tokens"] = counters.get("num_tokens", 0) + stats.num_tokens
        counters["skipped_steps"] = counters.get("skipped_steps", 0) + stats.skipped
        seconds = time.perf_counter() - self._step_started
        values: dict[str, Any] = {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}
        if len(stats.terms) > 1:
            values |= stats.terms
        values |= more
        values |= {"num_tokens": counters["num_tokens"], "num_trained": stats.num_trained}
        if counters["skipped_steps"]:
            values["skipped_steps"] = counters["skipped_steps"]
        values |= {"tokens_per_second": stats.num_tokens / seconds, "step_seconds": seconds, "data_seconds": self._data_seconds}
        if self.config.log_peak_memory_stats:
            values["peak_memory_gib"] = peak_memory_gib(self.device)
        if step % self.config.log_every_n_steps == 0 or step == self._total:
            self._metrics.log(step, values)
        if stats.skipped:
            self.note(f"step {step}: no update (loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g})")
        self._progress.update(step, values)

    def due(self, every: int | None, step: int) -> bool:
        """Whether something done `every` so many steps is due after `step`; at the last step it always is."""
        return step == self._total or (every is not None and step % every == 0)

    def validate(self, step: int, compute: Callable[[], float]) -> None:
        """Compute and log the validation loss where it is due."""
        assert self._metrics is not None
        if self.due(self.config.run_val_every_n_steps, step):
            loss = compute()
            self._metrics.log(step, {"val_loss": loss})
            self.note(f"step {step}: validation loss {loss:.4f}")

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint every save_every_n_steps, at the end, and when the run was asked to stop."""
        assert self._checkpoints is not None
        if self.due(self.config.save_every_n_steps, step) or self._signal is not None:
            if self._metrics is not None:
                self._metrics.sync()
            self._checkpoints.save(step)

    def note(self, text: str) -> None:
        """Tell the user something, without disturbing the progress line."""
        self._progress.note(text)

    # --- checkpoints ---------------------------------------------------------------------------------

    def keep(self, model: CausalLM, tokenizer: Tokenizer, optimizer: Any, data: Any, source: Source) -> None:
        """Name what the run's checkpoints hold."""
        adapter = isinstance(self.config.weights, LoRAWeights)
        base = str(source.folder.resolve()) if source.folder and Path(source.name).is_dir() else source.name

        def stage() -> Callable[[Path], dict[str, str]]:
            background = self.config.enable_async_checkpointing
            if adapter:
                return peft.stage_adapter(model, base, tokenizer, copy=background)
            return stage_repository(model, tokenizer, source.folder, copy=background)

        self._checkpoints = Checkpoints(
            self.folder,
            stage,
            optimizer,
            data,
            fingerprint=self._fingerprint(source, data),
            keep_last=self.config.keep_last_n_checkpoints,
            background=self.config.enable_async_checkpointing,
        )
        self._check_saved = lambda folder: (peft.check_saved_adapter if adapter else _check_saved_model)(model, folder)
        if self.mesh.is_main:
            (self.folder / "data_report.json").write_text(json.dumps(data.report.to_dict(), indent=1))

    def _fingerprint(self, source: Source, data: Any) -> dict[str, Any]:
        """What must not change between a stop and a resume, or the numbers would."""
        config = self.config
        print_of = fingerprint_folder(source.folder) if source.folder else json.dumps(source.hf_config, sort_keys=True)
        weights = json.loads(json.dumps(vars(config.weights) | {"type": config.weights.type}))
        weights.pop("adapter", None)
        return {
            "recipe": self.recipe,
            "model": print_of,
            "weights": weights,
            "optimizer": config.optimizer.type,
            "dtype": config.dtype,
            "seed": config.seed,
            "data": data.fingerprint,
        }

    # --- the end -------------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Wait for the last checkpoint, read it back and compare, write the report; return the checkpoint's folder.

        Ends the process where a signal asked the run to stop: exit code 130 or 143, the checkpoint saved.
        """
        assert self._checkpoints is not None and self._metrics is not None and self._check_saved is not None
        self._checkpoints.close()
        self._metrics.close()
        self._progress.close()
        step = self._checkpoints.last_saved
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        if self._signal is None:
            self._check_saved(folder)
        if self.mesh.is_main:
            write_report(self.folder)
            print(f"{'saved' if self._signal is None else 'stopped and saved'} after step {step}: {folder}\nreport: {self.folder / 'report.html'}", file=sys.stderr)
        if self._signal is not None:
            print("go on with the same command and resume_from_checkpoint=true", file=sys.stderr)
            raise SystemExit(128 + self._signal)
        return folder

    def close(self) -> None:
        """Let go of files and threads, also after an error; nothing is saved."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While the loop runs, the first SIGINT or SIGTERM ends it after the step; a second one ends it at once."""

        def ask(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, before[number] or signal.SIG_DFL)
            name = "interrupted" if number == signal.SIGINT else "asked to end"
            self.note(f"{name}: saving after this step (once more ends at once, without saving)")

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def _check_saved_model(model: CausalLM, folder: Path) -> None:
    from tunesmith.checkpoint.hf import check_saved

    check_saved(model, folder)


@contextlib.contextmanager
def start_run(config: TrainSettings, recipe: str) -> Iterator[Run]:
    """Claim the run folder, check the config against the machine, seed, and start the mesh.

    Raises UserError before anything is loaded where something can't work, or where the folder holds another run.
    """
    check(config)
    device = pick_device(config.device)
    if config.seed is None:
        config.seed = int.from_bytes(os.urandom(4), "little")
    folder = Path(config.output_dir)
    lock = _claim(folder, config.resume_from_checkpoint)
    seed_everything(config.seed, config.deterministic)
    mesh = start_mesh(device, config.data_parallel_replicate_dim)
    run = Run(config, recipe, mesh, folder)
    if mesh.is_main:
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "environment.json").write_text(json.dumps(_environment(device), indent=1))
    try:
        yield run
    finally:
        run.close()
        stop_mesh()
        os.close(lock)


def _claim(folder: Path, resume: bool) -> int:
    """Make the folder and lock it for this process; an open file descriptor holds the lock until the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(f"output_dir {folder} can't be written ({error.strerror}): choose another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"another run is writing into {folder}: wait for it, or choose another `output_dir`") from error
    if not resume and any(path.name != ".lock" for path in folder.iterdir()):
        os.close(lock)
        raise UserError(f"output_dir {folder} is not empty: set `resume_from_checkpoint=true` to go on with that run, or choose another")
    return lock


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's and torch's generators; with `deterministic`, refuse kernels that are not."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def _environment(device: torch.device) -> dict[str, Any]:
    import platform

    import tunesmith

    return {
        "tunesmith": tunesmith.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
    }
