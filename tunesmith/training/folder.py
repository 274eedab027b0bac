"""The run folder: claimed by one process, given back untouched by a run that never came to a step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.checkpoint.uploads import Uploads
from tunesmith.errors import UserError
from tunesmith.parallel.device import device_name
from tunesmith.parallel.mesh import Ranks
from tunesmith.training.preflight import is_restart

BEAT_SECONDS = 10.0
LOCK = ".lock"


class Claim:
    """A run folder held by this process: by a lock, and by a record that a thread renews, for file systems whose locks do not
    reach other nodes. `resumes`: whether the run goes on with what is in the folder.
    """

    def __init__(self, descriptor: int, resumes: bool):
        self.resumes, self._descriptor, self._beats = resumes, descriptor, 0
        self._stopped = threading.Event()
        self._record()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def release(self, clean: bool) -> None:
        """Let go of the folder. Without `clean` the record stays: it tells a restart of the same launch that it is one."""
        self._stopped.set()
        self._thread.join()
        if clean:
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._beats += 1
            with contextlib.suppress(OSError):  # a full disk: others tell of it
                self._record()

    def _record(self) -> None:
        record = {"host": platform.node(), "pid": os.getpid(), "launch": launch(), "beats": self._beats}
        content = json.dumps(record).encode()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))


def claim(folder: Path, resume: bool, uploads: Uploads | None = None) -> Claim:
    """Make the folder and hold it for this process.

    uploads: of a run whose `output_dir` is a URL, which works in `folder`. A run that torchrun started again goes on without
    being asked to. Raises UserError where the folder can't be written, is another run's, or (without `resume`) is not empty.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        reason = "no folder can be made there" if error.errno == errno.ENOENT else error.strerror  # as in /proc
        raise UserError(f"output_dir {folder} can't be written ({reason}): choose another") from error
    try:
        before = claimed_by(folder)
        resumes = resume or is_restart() or (launch() is not None and before.get("launch") == launch())
        if not resumes and uploads is not None and launch() is not None:
            resumes = uploads.claimed_by().get("launch") == launch()
        if not _lock(descriptor) or _is_alive(folder, before):
            raise UserError(
                f"another run is writing into {folder}: wait for it, or choose another `output_dir`{_where(before)}"
            )
        if not resumes and uploads is not None:
            uploads.check_empty()
        elif not resumes and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(
                f"output_dir {folder} is not empty: set `resume_from_checkpoint=true` to go on with that run, or choose another"
            )
        return Claim(descriptor, resumes)
    except BaseException:
        os.close(descriptor)
        raise


def claimed_by(folder: Path) -> dict[str, Any]:
    """The record of the process that holds the folder, or held it and did not come to let go; empty where there is none."""
    try:
        return json.loads((folder / LOCK).read_text())
    except (OSError, ValueError):
        return {}


def check_shared(folder: Path, ranks: Ranks, url: str | None = None, patience: float = 60.0) -> None:
    """Raise the same UserError on every rank where one does not see the folder that rank 0 holds.

    url: the `output_dir` for which the run works there.
    """
    holder = ranks.from_main(lambda: _holder(folder))

    def look() -> None:
        deadline = time.monotonic() + patience
        while _holder(folder) != holder:  # a network file system may show it late
            if time.monotonic() > deadline:
                what = f"output_dir {folder} is another folder on {platform.node()} than on {holder[0]}"
                if url is not None:
                    raise UserError(
                        f"{what}, and checkpoints for {url} are put together there: set TUNESMITH_CACHE to a folder that all nodes share"
                    )
                raise UserError(f"{what}: name one that all nodes share")
            time.sleep(0.2)

    ranks.on_all(look)


def _holder(folder: Path) -> tuple[Any, Any]:
    record = claimed_by(folder)
    return record.get("host"), record.get("pid")


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now; on a file system without locks it always is, and the record alone protects."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_alive(folder: Path, before: dict[str, Any]) -> bool:
    """Whether a process on another node, which our lock may not tell of, still renews its record."""
    if before.get("host") in (None, platform.node()) or before.get("launch") == launch() is not None:
        return False
    deadline = time.monotonic() + 2.5 * BEAT_SECONDS
    while time.monotonic() < deadline:
        if (now := claimed_by(folder)) and now != before:
            return True
        time.sleep(BEAT_SECONDS / 20)
    return False


def _where(record: dict[str, Any]) -> str:
    return f" (process {record['pid']} on {record['host']})" if record else ""


def launch() -> str | None:
    """What tells one launch by torchrun from another; the same after its restarts, also on a node that was lost and came back."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def unclaim(folder: Path) -> None:
    """Take back what was written into the folder of a run that never came to its first step, so that the next try finds it empty."""
    for name in ("config.yaml", "environment.json", "data_report.json", "samples.jsonl", "metrics.jsonl", LOCK):
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
