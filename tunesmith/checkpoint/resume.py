"""Checkpoints of a run: each is a complete model repository (or PEFT adapter) with what a resumed run needs beside it.

    checkpoints/step-00000100/          config.json, *.safetensors, tokenizer …   (or adapter_config.json, …)
    checkpoints/step-00000100/resume/   optimizer.safetensors, state.json
    checkpoints/latest                  the name of the newest complete one

A checkpoint is written under a hidden name and renamed when every byte is on disk, so a half-written one is never
taken for complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from tunesmith.checkpoint.hf import verify, write_tensors
from tunesmith.errors import UserError
from tunesmith.parallel import device as accelerator
from tunesmith.parallel.mesh import Mesh

_NAME = re.compile(r"step-(\d{8,})")
RESUME = "resume"


class HasState(Protocol):
    def state(self) -> Any: ...


class Checkpoints:
    """The checkpoints of one run folder.

    `write_model(folder)` is given by the caller: it stages the weights at once and returns the function that writes
    them, with digests, into a folder. So a checkpoint may be written in the background while training goes on.
    """

    def __init__(
        self,
        run_folder: Path,
        stage_model: Callable[[], Callable[[Path], dict[str, str]]],
        optimizer: Any,
        data: Any,
        fingerprint: dict[str, Any],
        mesh: Mesh,
        keep_last: int | None = None,
        background: bool = False,
    ):
        self.folder = run_folder / "checkpoints"
        self.counters: dict[str, Any] = {}
        self.last_saved: int | None = None
        self._stage_model, self._optimizer, self._data, self._mesh = stage_model, optimizer, data, mesh
        self._fingerprint, self._keep_last = fingerprint, keep_last
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    # --- saving --------------------------------------------------------------------------------------

    def save(self, step: int) -> Path:
        """Save a checkpoint after `step`; in the background if asked (the state of now is copied first)."""
        target = self.folder / f"step-{step:08d}"
        self.wait()
        write_model = self._stage_model()
        tensors, values = self._optimizer.state()
        state = {
            "step": step,
            "fingerprint": self._fingerprint,
            "counters": dict(self.counters),
            "data": self._data.state(),
            "optimizer": values,
            "python_random": random.getstate(),
        }
        tensors = {f"optimizer::{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"rng::{name}": tensor for name, tensor in accelerator.rng_state(self._mesh.device).items()}
        if self._pool is None:
            self._write(target, write_model, tensors, state)
        else:
            staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self._pending = self._pool.submit(self._write, target, write_model, staged, state)
        self.last_saved = step
        return target

    def wait(self) -> None:
        """Wait for a background save; its error, if any, is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        if self._pool is not None:
            self.wait()
            self._pool.shutdown()

    def _write(
        self,
        target: Path,
        write_model: Callable[[Path], dict[str, str]],
        tensors: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        partial = self.folder / f".{target.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / RESUME).mkdir(parents=True)
            digests = write_model(partial)
            tensor_digests = write_tensors(tensors, partial / RESUME, "optimizer")
            digests |= {f"{RESUME}/{name}": digest for name, digest in tensor_digests.items()}
            verify(partial, digests)
            _write_synced(partial / RESUME / "state.json", json.dumps({**state, "digests": digests}))
            if target.exists():  # the same step saved again, after a resume with less to do
                _remove(target)
            os.rename(partial, target)
            _sync_folder(self.folder)
            point_latest(self.folder, target.name)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"no space left for the checkpoint {target}: free some or set `keep_last_n_checkpoints`, then go on "
                    "with `resume_from_checkpoint=true`; earlier checkpoints are whole"
                ) from error
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._keep_last is not None:
            for _, folder in complete_checkpoints(self.folder)[: -self._keep_last]:
                _remove(folder)

    # --- resuming ------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> int:
        """Set optimizer, data position, RNG and counters to those of the checkpoint in `folder`; return its step.

        The weights are the caller's to load. Raises UserError where the run it was saved by differs in what decides the
        numbers: base model, trained weights, data, global batch.
        """
        check_same_run(folder, self._fingerprint)
        state = read_state(folder)
        tensors = {}
        for file in sorted((folder / RESUME).glob("optimizer*.safetensors")):
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
        self._optimizer.load_state(
            {n.removeprefix("optimizer::"): t for n, t in tensors.items() if n.startswith("optimizer::")},
            state["optimizer"],
        )
        self._data.load_state(state["data"])
        self.counters = dict(state["counters"])
        accelerator.set_rng_state(
            self._mesh.device, {n.removeprefix("rng::"): t for n, t in tensors.items() if n.startswith("rng::")}
        )
        version, internal, gauss = state["python_random"]
        random.setstate((version, tuple(internal), gauss))
        self.last_saved = state["step"]
        return state["step"]


# --- the folder --------------------------------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if (path / RESUME / "state.json").is_file())


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, checked against its digests; None where there is none."""
    folder = run_folder / "checkpoints"
    for partial in [*folder.glob(".step-*.partial"), *folder.glob(".removed-*")]:
        shutil.rmtree(partial, ignore_errors=True)
    complete = complete_checkpoints(folder)
    if not complete:
        return None
    newest = complete[-1][1]
    try:
        verify(newest, read_state(newest)["digests"])
    except UserError as error:
        raise UserError(f"{error}; remove {newest}, and `resume_from_checkpoint=true` takes the one before") from error
    point_latest(folder, newest.name)
    return newest


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / RESUME / "state.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: remove {folder}, and `resume_from_checkpoint=true` takes the one before"
        ) from error


def check_same_run(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Raise UserError, naming the changes, where the checkpoint in `folder` was saved with other values of `fingerprint`."""
    saved = read_state(folder)["fingerprint"]
    changed = [key for key in sorted(fingerprint) if saved.get(key) != fingerprint[key]]
    if changed:
        was = "; ".join(_change(key, saved.get(key), fingerprint[key]) for key in changed)
        raise UserError(
            f"{folder} can't be resumed with this configuration: {was}. Undo the change, or start in another `output_dir`"
        )


def _change(key: str, was: Any, now: Any) -> str:
    if key in ("data", "model"):  # digests tell a person nothing
        return f"the {'data or how they are read' if key == 'data' else 'model'} changed"
    return f"{key} was {was}, is now {now}"


def point_latest(folder: Path, name: str) -> None:
    """Make `latest` name a checkpoint, in one step: a reader sees the old name or the new one."""
    temporary = folder / ".latest.partial"
    _write_synced(temporary, name + "\n")
    os.replace(temporary, folder / "latest")
    _sync_folder(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that one that is half deleted is never taken for complete."""
    hidden = folder.with_name(f".removed-{folder.name}")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint_folder(folder: Path) -> str:
    """A digest that tells model folders apart without reading them whole: configuration, tensor tables, file sizes, and the ends of each file."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *folder.glob("*.safetensors"),
            *folder.glob("*.pth"),
            *folder.glob("pytorch_model*.bin"),
            folder / "config.json",
        ]
    ):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]
