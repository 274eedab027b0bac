"""Profiles of a run, written into profile/ of its folder: torch.profiler traces of a few steps, snapshots of an accelerator's memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch.profiler

from tunesmith.configs.profile import Profiler
from tunesmith.parallel import device as accelerator


class Trace(Protocol):
    """Told after every step."""

    def step(self) -> None: ...


class _NoTrace:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiler(config: Profiler, folder: Path, rank: int = 0) -> Iterator[Trace]:
    """Within this context, `step()` after every training step; records what `config` asks for, or nothing.

    Each cycle of wait, warm-up and recorded steps leaves in `folder`/profile a trace for chrome://tracing or ui.perfetto.dev (trace-….json.gz)
    and a table of the costliest operators (operators-….txt), each under the name of its rank.
    """
    if not config.enabled or not _records(config, rank):
        yield _NoTrace()
        return
    target = Path(folder) / "profile"
    target.mkdir(parents=True, exist_ok=True)
    schedule = torch.profiler.schedule(
        wait=config.wait_steps, warmup=config.warmup_steps, active=config.active_steps, repeat=config.num_cycles
    )
    with torch.profiler.profile(
        activities=torch.profiler.supported_activities(),
        schedule=schedule,
        on_trace_ready=lambda trace: _write(trace, target, rank),
        record_shapes=config.record_shapes,
        profile_memory=config.profile_memory,
        with_stack=config.with_stack,
        acc_events=True,  # without it torch warns at every cycle but the last
    ) as trace:
        yield trace


def _records(config: Profiler, rank: int) -> bool:
    return config.ranks is None or rank in config.ranks


def _write(trace: torch.profiler.profile, target: Path, rank: int) -> None:
    name = f"rank{rank}-step{trace.step_num:06d}"
    trace.export_chrome_trace(str(target / f"trace-{name}.json.gz"))
    averages = trace.key_averages()
    on_device = any(event.self_device_time_total for event in averages)
    table = averages.table(sort_by="self_device_time_total" if on_device else "self_cpu_time_total", row_limit=40)
    (target / f"operators-{name}.txt").write_text(table + "\n")


class MemorySnapshots:
    """Snapshots of an accelerator's memory, every so many steps and where it ran out: profile/memory-rank0-step000010.pickle, …-oom.pickle."""

    def __init__(self, config: Profiler, folder: Path, rank: int, device: torch.device):
        self._every = config.memory_snapshot_every_n_steps if _records(config, rank) else None
        self._folder, self._rank = Path(folder) / "profile", rank
        self.is_recording = self._every is not None and accelerator.start_memory_history(device)
        if self.is_recording:
            self._folder.mkdir(parents=True, exist_ok=True)

    def step(self, step: int) -> None:
        """To be called after every step."""
        if self.is_recording and self._every is not None and step % self._every == 0:
            self._write(f"step{step:06d}")

    def __enter__(self) -> MemorySnapshots:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """An out-of-memory error leaves a snapshot, and goes on its way."""
        if not self.is_recording:
            return
        if isinstance(error, torch.OutOfMemoryError):
            path = self._write("oom")
            print(
                f"rank {self._rank} ran out of memory; what held it: {path} (open it at pytorch.org/memory_viz)",
                file=sys.stderr,
            )
        accelerator.stop_memory_history()

    def _write(self, moment: str) -> Path:
        path = self._folder / f"memory-rank{self._rank}-{moment}.pickle"
        accelerator.write_memory_snapshot(path)
        return path
