"""Profiles of a run: torch.profiler traces of a few steps, written into profile/ of the run folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch.profiler

from tunesmith.configs.shared import Profiler


class Trace(Protocol):
    """Told after every step."""

    def step(self) -> None: ...


class _NoTrace:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiler(config: Profiler, folder: Path) -> Iterator[Trace]:
    """Within this context, `step()` after every training step; records what `config` asks for, or nothing.

    Each cycle of wait, warm-up and recorded steps leaves in `folder`/profile a trace for chrome://tracing or ui.perfetto.dev (trace-….json.gz)
    and a table of the costliest operators (operators-….txt). Of several processes each writes its own.
    """
    if not config.enabled:
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
        on_trace_ready=lambda trace: _write(trace, target),
        record_shapes=config.record_shapes,
        profile_memory=config.profile_memory,
        with_stack=config.with_stack,
        acc_events=True,  # without it torch warns at every cycle but the last
    ) as trace:
        yield trace


def _write(trace: torch.profiler.profile, target: Path) -> None:
    name = f"rank{os.environ.get('RANK', '0')}-step{trace.step_num:06d}"
    trace.export_chrome_trace(str(target / f"trace-{name}.json.gz"))
    averages = trace.key_averages()
    on_device = any(event.self_device_time_total for event in averages)
    table = averages.table(sort_by="self_device_time_total" if on_device else "self_cpu_time_total", row_limit=40)
    (target / f"operators-{name}.txt").write_text(table + "\n")
