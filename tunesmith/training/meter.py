"""How fast steps are and what they take, from one logged line to the next."""

from __future__ import annotations

import time

from tunesmith.configs.shared import TrainSettings
from tunesmith.parallel.device import memory_counts, peak_memory_gib, reset_peak_memory
from tunesmith.parallel.mesh import Mesh
from tunesmith.training.flops import Flops, peak_tflops
from tunesmith.training.step import StepStats


class Meter:
    """`start_step`, reading data and computing, `end_step`, then `values`: of all steps since `clear`, validation and saving between them left out."""

    def __init__(self, config: TrainSettings, mesh: Mesh):
        self.flops: Flops | None = None
        """What a token costs, where it is known."""
        self._config, self._mesh = config, mesh
        self._peak_tflops = peak_tflops(mesh.device, config.dtype)
        self.clear()
        self.start_step()

    def clear(self) -> None:
        self._steps = self._tokens = 0
        self._seconds = self._waited = self._work = 0.0
        self._memory: dict[str, float] = {}

    def start_step(self) -> None:
        reset_peak_memory(self._mesh.device)
        self._started = time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Count seconds of the step as spent waiting for data."""
        self._waited += seconds

    def end_step(self, stats: StepStats) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps, self._tokens = self._steps + 1, self._tokens + stats.num_tokens
        if self.flops is not None:
            self._work += self.flops.of_step(stats.num_tokens, stats.num_trained, stats.num_seen)
        if self._config.log_peak_memory_stats:
            device = self._mesh.device
            for name, value in {"peak_memory_gib": peak_memory_gib(device), **memory_counts(device)}.items():
                self._memory[name] = max(value, self._memory.get(name, 0.0))

    def values(self) -> dict[str, float]:
        """Tokens a second, model FLOP/s (training/flops.py) of a device and their share of what it could do; seconds of a step, and
        of them those that waited for data, and memory: of the rank that has most. To be called by all ranks."""
        own = {"step_seconds": self._seconds / self._steps, "data_seconds": self._waited / self._steps, **self._memory}
        costs = dict(zip(own, self._mesh.max(list(own.values()))))
        devices, seconds = self._mesh.world_size, self._steps * costs["step_seconds"]
        speed = {"tokens_per_second_per_device": self._tokens / seconds / devices} if devices > 1 else {}
        speed["tokens_per_second"] = self._tokens / seconds
        if self.flops is not None:
            speed["tflops_per_device"] = self._work / seconds / devices / 1e12
            if self._peak_tflops is not None:
                speed["mfu"] = speed["tflops_per_device"] / self._peak_tflops
        return speed | costs
