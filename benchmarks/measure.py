"""Contenders in processes of their own: what they cost in time and memory, and on what machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_SIGN = "@mark "
_CLOCK = "TUNESMITH_BENCHMARK_CLOCK"
PACKAGES = (
    "torch",
    "tunesmith",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "lm_eval",
    "accelerate",
    "tokenizers",
    "safetensors",
)


@dataclass(frozen=True)
class Options:
    quick: bool
    rounds: int
    threads: int
    """Of each contender."""
    clock: str
    """wall, or cpu: the processor seconds that a process has used itself, for machines where others work too."""
    model: str | None = None
    """The folder of a model to take instead of one with random weights, where a benchmark can."""


def now() -> float:
    """Called by a contender: seconds on the clock that was chosen."""
    return time.process_time() if os.environ.get(_CLOCK) == "cpu" else time.perf_counter()


def mark(name: str, **values: Any) -> None:
    """Called by a contender: tell the parent that something has just happened."""
    one = {"name": name, "wall": time.time(), "cpu": time.process_time(), **values}
    print(
        _SIGN + json.dumps(one), file=sys.__stdout__, flush=True
    )  # whatever a contender has put in the place of stdout


class StepClock:
    """A metric logger of tunesmith that marks each step; of its kind a user would name in `metric_logger.type`."""

    def __init__(self, folder: Path, config: Any):
        pass

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            mark("step", step=step, loss=metrics["loss"], tokens=metrics["num_tokens"])

    def close(self) -> None:
        pass


@dataclass
class Outcome:
    """What became of one process. Times are seconds since it was started, on the clock that was chosen."""

    marks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """Until it ended."""
    peak_gib: float = 0.0
    """Highest resident memory."""

    def named(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.marks if one["name"] == name]

    def value(self, name: str, key: str = "time") -> Any:
        return self.named(name)[-1][key]


def run_process(words: Sequence[str], folder: Path, options: Options) -> Outcome:
    """Start `words` with a cache of its own, read its marks, and watch its memory; its output is shown if it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        caches = {"TUNESMITH_CACHE": cache, "HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
        own = {**caches, "OMP_NUM_THREADS": str(options.threads), _CLOCK: options.clock}
        started, used = time.time(), _children_seconds()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **own}, cwd=cache
            )
            outcome = Outcome()
            watcher = threading.Thread(target=_watch_memory, args=(process, outcome))
            watcher.start()
            assert process.stdout is not None
            for line in process.stdout.read().decode().splitlines():
                if line.startswith(_SIGN):
                    one = json.loads(line.removeprefix(_SIGN))
                    since = one["cpu"] if options.clock == "cpu" else one["wall"] - started
                    outcome.marks.append({**one, "wall": one["wall"] - started, "time": since})
            code = process.wait()
            outcome.seconds = _children_seconds() - used if options.clock == "cpu" else time.time() - started
            watcher.join()
            if code:
                errors.seek(0)
                raise RuntimeError(f"{' '.join(words)} ended with {code}:\n{errors.read().decode()[-4000:]}")
    return outcome


def run_contender(file: str, name: str, folder: Path, options: Options, **arguments: Any) -> Outcome:
    """Call function `name` of the benchmark `file` with `arguments` in a process of its own."""
    return run_process([sys.executable, file, name, json.dumps(arguments)], folder, options)


def be_contender(functions: dict[str, Any]) -> None:
    """The other end of run_contender: what a benchmark's file does when it is started itself."""
    functions[sys.argv[1]](**json.loads(sys.argv[2]))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch_memory(process: subprocess.Popen, outcome: Outcome) -> None:
    """Poll the high-water mark: contenders may reset it, so the last value alone would not do."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    outcome.peak_gib = max(outcome.peak_gib, int(line.split()[1]) / 2**20)
        except OSError:
            return
        time.sleep(0.02)


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs: what slows a whole round down cancels."""
    return median(a / b for a, b in zip(ours, theirs))


@dataclass
class Table:
    title: str
    headers: list[str]
    rows: list[list[Any]]
    raw: Any = None
    """Every measurement, for the JSON."""

    def markdown(self) -> str:
        cells = [self.headers, *[[_text(cell) for cell in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.2f}"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, and how busy it is with other work."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
