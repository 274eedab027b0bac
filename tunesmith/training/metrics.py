"""metrics.jsonl, which every run writes."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.training.loggers import build_logger


class Metrics:
    """Writes each logged step to `folder`/metrics.jsonl and passes it on to the logger that `config.metric_logger` names.

    On a resume from the checkpoint of step `resume_step`, lines of later steps (and a line torn by a crash) are removed first; without one the file starts empty.
    With `enabled` false (every rank but the main one) nothing is written.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        total_steps: int | None = None,
        resume_step: int | None = None,
        enabled: bool = True,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self._file = self._logger = None
        if not enabled:
            return
        self._logger = build_logger(Path(folder), config, total_steps, resume_step or 0)
        _keep_steps(self.path, resume_step or 0)
        self._file = open(self.path, "ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line: `step` and the named `values` (numbers, 0-dimensional tensors or texts; NaN and infinities become null)."""
        if self._file is None:
            return
        row = {"step": int(step), **{name: _plain(value) for name, value in values.items()}}
        line = json.dumps(
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            },
            allow_nan=False,
        )
        try:
            self._file.write(line.encode() + b"\n")  # one unbuffered write: a kill leaves the whole line or none of it
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror}): make room or choose another output_dir, then resume"
            ) from error
        numbers = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, int | float)
        }
        if self._logger is not None:
            self._pass_on(int(step), numbers)

    def sync(self) -> None:
        """Force the lines written so far to the disk, so that they outlive a power cut as a checkpoint does."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the logger; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def _pass_on(self, step: int, numbers: dict[str, float]) -> None:
        """A logger that fails (a server gone away, say) is reported and dropped; training goes on, metrics.jsonl has everything."""
        assert self._logger is not None
        try:
            self._logger.log(step, numbers)
        except Exception:
            traceback.print_exc()
            print(
                f"the metric logger {type(self._logger).__name__} failed and is switched off; {self.path} has every number",
                file=sys.stderr,
            )
            self._logger = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a last line that a crash tore is left out, no file is no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _keep_steps(path: Path, last_step: int) -> None:
    """Rewrite the file, atomically, with the whole lines of steps up to `last_step`."""
    kept = [
        line + b"\n"
        for line in (path.read_bytes().split(b"\n")[:-1] if path.exists() else [])
        if _step_of(line) <= last_step
    ]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf  # not one of our lines: torn


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
