"""Python's garbage collector, held back while steps run.

It runs by itself at moments that differ from rank to rank, and every rank then waits for the one that collects.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Between `start` and `stop` garbage is collected after every n-th step, on all ranks alike; with n None by Python itself."""

    def __init__(self, every_n_steps: int | None):
        self.every = every_n_steps
        self._is_held = False

    def start(self) -> None:
        if self.every is not None and gc.isenabled():
            gc.collect()
            gc.freeze()  # model and libraries stay until the end: a collection need not look at them again
            gc.disable()
            self._is_held = True

    def step(self, step: int) -> None:
        """To be called after every step."""
        if self._is_held and self.every is not None and step % self.every == 0:
            gc.collect()

    def stop(self) -> None:
        """Leave it to Python again; safe to call twice."""
        if self._is_held:
            gc.unfreeze()
            gc.enable()
            self._is_held = False
