"""The run folder: claimed by one process, given back untouched by a run that never came to a step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.errors import UserError
from tunesmith.parallel.device import device_name


def claim(folder: Path, resume: bool) -> int:
    """Make the folder and lock it for this process; the file descriptor that is returned holds the lock while it is open.

    Raises UserError where the folder can't be written, is another run's, or (without `resume`) is not empty.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        reason = "no folder can be made there" if error.errno == errno.ENOENT else error.strerror  # as in /proc
        raise UserError(f"output_dir {folder} can't be written ({reason}): choose another") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"another run is writing into {folder}: wait for it, or choose another `output_dir`") from error
    if not resume and any(path.name != ".lock" for path in folder.iterdir()):
        os.close(lock)
        raise UserError(
            f"output_dir {folder} is not empty: set `resume_from_checkpoint=true` to go on with that run, or choose another"
        )
    return lock


def unclaim(folder: Path) -> None:
    """Take back what was written into the folder of a run that never came to its first step, so that the next try finds it empty."""
    for name in ("config.yaml", "environment.json", "data_report.json", "samples.jsonl", "metrics.jsonl", ".lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it was there before
        folder.rmdir()


def environment(device: torch.device) -> dict[str, Any]:
    """What the run runs on and with, for the report."""
    return {
        "tunesmith": tunesmith.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
    }
