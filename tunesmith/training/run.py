"""A run: its steps, metrics, progress, checkpoints and how it ends; `start.py` begins it.

with start_run(config, "sft") as run:
    …
    run.keep(model, tokenizer, optimizer, data, source)
    for step in run.steps(data.total_steps):
        run.log(step, train_step(…))
        run.save_if_due(step)
    run.finish()
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.checkpoint import adapter as peft
from tunesmith.checkpoint.hf import check_saved, stage_repository
from tunesmith.checkpoint.resume import Checkpoints
from tunesmith.checkpoint.uploads import Uploads
from tunesmith.config import dump_config
from tunesmith.configs.shared import TrainSettings
from tunesmith.configs.weights import LoRAWeights
from tunesmith.data.report import DataReport
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.fake_quantize import set_rounding
from tunesmith.parallel.mesh import Mesh, Ranks
from tunesmith.training.convert import quantize_trained
from tunesmith.training.fit import check_fit
from tunesmith.training.folder import environment
from tunesmith.training.garbage import GarbageCollection
from tunesmith.training.meter import Meter
from tunesmith.training.metrics import Metrics
from tunesmith.training.profile import MemorySnapshots, profiler
from tunesmith.training.progress import Progress
from tunesmith.training.report import write_report
from tunesmith.training.signals import stop_on_signal
from tunesmith.training.source import Source
from tunesmith.training.step import StepStats
from tunesmith.training.watchdog import Watchdog

T = TypeVar("T")


class Run:
    """What a recipe's loop needs around it. Made by `start_run`."""

    def __init__(
        self,
        config: TrainSettings,
        recipe: str,
        mesh: Mesh,
        folder: Path,
        watchdog: Watchdog,
        resume_from: Path | None = None,
        uploads: Uploads | None = None,
    ):
        self.config, self.recipe, self.mesh, self.folder = config, recipe, mesh, folder
        self._uploads = uploads
        self.device, self.resume_from = mesh.device, resume_from
        self._resumed_step = int(self.resume_from.name.removeprefix("step-")) if self.resume_from else None
        self._watchdog = watchdog
        self._signal: int | None = None
        """The signal that came to this rank."""
        self._ending: int | None = None
        """The one at which all ranks agreed to end."""
        self._step_taken = False
        self._total = 0
        self._meter = Meter(config, mesh)
        self._garbage = GarbageCollection(config.gc_every_n_steps)
        self.memory_snapshots = MemorySnapshots(config.profiler, folder, mesh.rank, mesh.device)
        self._progress = Progress(None, enabled=mesh.is_main)
        self._metrics: Metrics | None = None
        self._checkpoints: Checkpoints | None = None
        self._data: Any = None
        self._check_saved: Callable[[Path], float | None] | None = None
        self._model: Any = None
        self._base: Path | None = None
        self._optimizer: Any = None

    def check_fit(self, source: Source, tokenizer: Tokenizer, beside: Source | None = None) -> None:
        """Before data are read: raise UserError where model, tokenizer, adapter and layout don't fit together, warn where they may not.

        beside: a frozen model that computes along with every step.
        """
        self._watchdog.at(0, "reading model and data")
        self._meter.flops, warnings = check_fit(self.config, source, tokenizer, self.mesh, self.resume_from, beside)
        for warning in warnings:
            self.note(warning)

    # --- the loop ------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """Resume if asked, then count the steps that are left, up to `total`; ends early, after a whole step, on SIGINT, SIGTERM or SIGHUP."""
        assert self._checkpoints is not None, "call keep() first"
        self._total = total
        done = self._checkpoints.restore(self.resume_from) if self.resume_from else 0
        if (qat := self.config.qat) and qat.fake_quant_after_n_steps >= total:
            raise UserError(
                f"`qat.fake_quant_after_n_steps` = {qat.fake_quant_after_n_steps} leaves none of the run's {total} steps to be "
                "trained with rounding: take fewer, or train longer"
            )
        planned = self._checkpoints.counters.get("total_steps", total)
        self._checkpoints.counters["total_steps"] = total
        self._record()
        self._metrics = Metrics(self.folder, self.config, total, self._resumed_step, enabled=self.mesh.is_main)
        self._progress = Progress(total, enabled=self.mesh.is_main, done=done)
        if done:
            self.note(f"resumed after step {done} from {self._place(self.resume_from)}")
        if planned != total:
            self.note(f"the run was planned for {planned} steps and is now for {total}; the learning rate follows")
        if self.config.compile or self.config.optimizer.type == "adamw_8bit":
            self.note("the first step compiles, which takes a while")
        if self.config.profiler.memory_snapshot_every_n_steps and self.device.type != "cuda":
            self.note(
                f"no memory snapshots are kept: {self.device.type} has no history of its memory, which CUDA and ROCm devices have"
            )
        tracing = profiler(self.config.profiler, self.folder, self.mesh.rank)
        self._garbage.start()
        with tracing as trace, stop_on_signal(self._ask_to_stop):
            for step in range(done + 1, total + 1):
                self._watchdog.at(step, "beginning")
                self._begin_rounding(step)
                self._meter.start_step()
                yield step
                trace.step()
                self.memory_snapshots.step(step)
                self._garbage.step(step)
                if self._agree_to_end():
                    if self._checkpoints.last_saved != step:  # the signal came after the recipe's own look
                        self._checkpoints.save(step)
                    break
            self._garbage.stop()
            self._checkpoints.wait()  # a signal must not end the process while the last one is written
            self._agree_to_end()

    def _begin_rounding(self, step: int) -> None:
        """Before a step of quantization-aware training: whether it computes with rounded numbers depends on its number alone."""
        qat = self.config.qat
        if qat and set_rounding(self._model, step > qat.fake_quant_after_n_steps) and qat.fake_quant_after_n_steps:
            anew = ", for which layers compile anew" if self.config.compile else ""
            self.note(f"from step {qat.fake_quant_after_n_steps + 1} on, numbers are rounded ({qat.type}){anew}")

    def _ask_to_stop(self, number: int) -> None:
        self._signal = number
        if number == signal.SIGINT:
            self.note("interrupted: saving after this step (once more ends at once, without saving)")

    def _agree_to_end(self) -> bool:
        """Whether a signal came to any rank: all end after the same step."""
        before = self._ending
        self._ending = before or int(self.mesh.max([self._signal or 0])[0]) or None
        if before is None and self._ending not in (None, signal.SIGINT):
            # Said only now: torchrun also sends SIGTERM to the ranks that are left when one has died.
            self.note("asked to end: saving (once more ends at once, without saving)")
        return self._ending is not None

    @property
    def running(self) -> dict[str, float]:
        """Statistics of a method that go on over the whole run: what is written here is saved and resumed with it."""
        assert self._checkpoints is not None, "call keep() first"
        return self._checkpoints.running

    @property
    def has_begun(self) -> bool:
        """Whether there is something to keep: a step was taken, now or before a resume."""
        return self._step_taken or self.resume_from is not None

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the loop early. To be asked on all ranks."""
        return self._agree_to_end()

    def next(self, read: Callable[[int], T], step: int) -> T:
        """`read(step)`, its time counted as waiting for data."""
        self._watchdog.at(step, "reading data")
        started = time.perf_counter()
        result = read(step)
        self._watchdog.at(step, "training")
        self._meter.wait(time.perf_counter() - started)
        return result

    def log(self, step: int, stats: StepStats, **more: float) -> None:
        """Log what a step did, and show it."""
        assert self._metrics is not None and self._checkpoints is not None
        self._step_taken = True
        counters = self._checkpoints.counters
        counters["num_tokens"] = counters.get("num_tokens", 0) + stats.num_tokens
        counters["skipped_steps"] = counters.get("skipped_steps", 0) + stats.skipped
        self._meter.end_step(stats)
        values: dict[str, Any] = {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}
        if len(stats.terms) > 1:
            values |= stats.terms
        values |= stats.metrics | more
        values |= {"num_tokens": counters["num_tokens"], "num_trained": stats.num_trained}
        if counters["skipped_steps"]:
            values["skipped_steps"] = counters["skipped_steps"]
        values |= self._meter.values()
        if self.due(self.config.log_every_n_steps, step):
            self._metrics.log(step, values)
            self._meter.clear()
        if stats.skipped:
            self.note(f"step {step}: no update (loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g})")
        self._progress.update(step, values)

    def due(self, every: int | None, step: int) -> bool:
        """Whether something done `every` so many steps is due after `step`; at the last step it always is."""
        return step == self._total or (every is not None and step % every == 0)

    def validate(self, step: int, compute: Callable[[], dict[str, float]]) -> None:
        """Compute and log the validation loss, and what comes with it, where it is due."""
        assert self._metrics is not None
        if self.due(self.config.run_val_every_n_steps, step):
            self._watchdog.at(step, "validating")
            means = compute()
            self._metrics.log(step, {f"val_{name}": value for name, value in means.items()})
            others = "".join(
                f", {name.replace('_', ' ')} {value:.4g}" for name, value in means.items() if name != "loss"
            )
            self.note(f"step {step}: validation loss {means['loss']:.4f}{others}")

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint every save_every_n_steps, at the end, and when the run was asked to stop."""
        assert self._checkpoints is not None
        if self._agree_to_end() or self.due(self.config.save_every_n_steps, step):
            self._watchdog.at(step, "saving")
            if self._metrics is not None:
                self._metrics.sync()
            self._checkpoints.save(step)

    def note(self, text: str) -> None:
        """Tell the user something, without disturbing the progress line."""
        self._progress.note(text)

    def _record(self) -> None:
        """Write down what the run is; not earlier, so that a resume that is refused leaves the folder as it was."""
        if self.mesh.is_main:
            (self.folder / "config.yaml").write_text(dump_config(self.config))
            (self.folder / "environment.json").write_text(json.dumps(environment(self.device), indent=1))
            self._record_data(self._data.report)

    def _record_data(self, report: DataReport) -> None:
        (self.folder / "data_report.json").write_text(json.dumps(report.to_dict(), indent=1))

    # --- checkpoints ---------------------------------------------------------------------------------

    def keep(
        self, model: CausalLM, tokenizer: Tokenizer, optimizer: Any, data: Any, source: Source, **fixed: Any
    ) -> None:
        """Name what the run's checkpoints hold. fixed: what else must not change between a stop and a resume."""
        adapter = isinstance(self.config.weights, LoRAWeights)
        base = str(source.folder.resolve()) if source.folder and Path(source.name).exists() else source.name

        def stage(ranks: Ranks) -> Callable[[Path], dict[str, str]]:
            background = self.config.enable_async_checkpointing
            if adapter:
                return peft.stage_adapter(model, base, tokenizer, copy=background, ranks=ranks)
            return stage_repository(model, tokenizer, source.folder, copy=background, ranks=ranks)

        self._checkpoints = Checkpoints(
            self.folder,
            stage,
            optimizer,
            data,
            fingerprint={**self._fingerprint(source, data), **fixed},
            mesh=self.mesh,
            keep_last=self.config.keep_last_n_checkpoints,
            background=self.config.enable_async_checkpointing,
            upload=self._uploads.push if self._uploads else None,
        )
        check = peft.check_saved_adapter if adapter else partial(check_saved, ranks=self.mesh.ranks)
        self._check_saved = lambda folder: check(model, folder)
        self._optimizer = optimizer
        self._data, self._model, self._base = data, model, source.folder if adapter else None

    def _fingerprint(self, source: Source, data: Any) -> dict[str, Any]:
        """What must not change between a stop and a resume, or the numbers would."""
        return {
            **fixed_settings(self.config, self.recipe),
            "model": source.fingerprint,
            "global_batch_size": data.rows_per_step,
            "data": data.fingerprint,
        }

    # --- the end -------------------------------------------------------------------------------------

    def finish(self) -> Path:
        """Wait for the last checkpoint, read it back and compare, write the report; return the checkpoint's folder.

        Ends the process where a signal asked the run to stop: exit code 130 or 143, the checkpoint saved.
        """
        assert self._checkpoints is not None and self._metrics is not None and self._check_saved is not None
        self._watchdog.at(self._total, "finishing")
        self._checkpoints.close()
        self._metrics.close()
        self._progress.close()
        step = self._checkpoints.last_saved
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        quantized = None
        if not self.stopped:
            rounded = set_rounding(self._model, False)  # a checkpoint holds plain numbers
            self._check_saved(folder)
            set_rounding(self._model, rounded)
            if self.config.qat:
                self._watchdog.at(self._total, "quantizing")
                quantized = quantize_trained(
                    self._model, self._optimizer, self.config, folder, self._base, self.mesh.ranks
                )
        position = self._data.merged(self.mesh.ranks.gather(self._data.state()))
        if self.mesh.is_main:
            self._record_data(self._data.report_at(position))  # of a stream only now it is known
            write_report(self.folder)
        if (uploads := self._uploads) is not None:
            self.mesh.ranks.from_main(lambda: uploads.finish(folder))
        if self.mesh.is_main:
            saved = "saved" if self._ending is None else "stopped and saved"
            print(
                f"{saved} after step {step}: {self._place(folder)}\nreport: {self._place(self.folder / 'report.html')}",
                file=sys.stderr,
            )
            if quantized:
                print(quantized, file=sys.stderr)
            if self._uploads is not None:
                print(f"a copy of both: {self.folder}", file=sys.stderr)
        if self._ending is not None and self.mesh.is_main:
            print("go on with the same command and resume_from_checkpoint=true", file=sys.stderr)
        self.mesh.ranks.barrier()  # torchrun ends all when one ends with a signal's exit code: not before the report is written
        if self._ending is not None:
            raise SystemExit(128 + self._ending)
        return folder

    def _place(self, path: Path | None) -> Path | str | None:
        """Where a user finds a file of the run folder."""
        return self._uploads.place(path) if self._uploads is not None and path is not None else path

    def close(self) -> None:
        """Let go of files and threads, also after an error; only a save that is under way is brought to its end."""
        self._garbage.stop()
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._checkpoints is not None:
            self._checkpoints.close()


def fixed_settings(config: TrainSettings, recipe: str) -> dict[str, Any]:
    """What a resume may not change, as far as the config alone tells."""
    weights = json.loads(json.dumps(vars(config.weights) | {"type": config.weights.type}))
    weights.pop("adapter", None)
    return {
        "recipe": recipe,
        "weights": weights,
        "qat": vars(config.qat) if config.qat else None,
        "optimizer": config.optimizer.type,
        "dtype": config.dtype,
        "seed": config.seed,
    }
