"""Checkpoints of a run: each is a complete model repository (or PEFT adapter) with what a resumed run needs beside it.

    checkpoints/step-00000100/          config.json, *.safetensors, tokenizer …   (or adapter_config.json, …)
    checkpoints/step-00000100/resume/   optimizer.safetensors, state.json
    checkpoints/latest                  the name of the newest complete one

A checkpoint is written under a hidden name and renamed when every byte is on disk, so a half-written one is never
taken for complete.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tunesmith.checkpoint.hf import outgoing, staged, verify
from tunesmith.checkpoint.tensor_files import StoredTensor, read_stem
from tunesmith.checkpoint.write import Outgoing, write_tensors
from tunesmith.errors import UserError
from tunesmith.hub import follow_latest
from tunesmith.nn.part import Part
from tunesmith.parallel import device as accelerator
from tunesmith.parallel.mesh import Mesh, Ranks

_NAME = re.compile(r"step-(\d{8,})")
RESUME = "resume"


class Data(Protocol):
    def state(self) -> dict[str, Any]: ...

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run, of the states of all ranks."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder.

    `stage_model(ranks)` is given by the caller: it stages the weights at once and returns the function that writes
    them, with digests, into a folder. So a checkpoint may be written in the background while training goes on. All ranks
    save together; the main one gives the checkpoint its name when all have written their files. Then `upload` is called
    with it, by all.
    """

    def __init__(
        self,
        run_folder: Path,
        stage_model: Callable[[Ranks], Callable[[Path], dict[str, str]]],
        optimizer: Any,
        data: Data,
        fingerprint: dict[str, Any],
        mesh: Mesh,
        keep_last: int | None = None,
        background: bool = False,
        upload: Callable[[Path, Ranks], None] | None = None,
    ):
        self.folder = run_folder / "checkpoints"
        self.counters: dict[str, Any] = {}
        self.running: dict[str, float] = {}
        """What a method adds up over the run."""
        self.last_saved: int | None = None
        self._stage_model, self._optimizer, self._data, self._mesh = stage_model, optimizer, data, mesh
        self._fingerprint, self._keep_last, self._upload = fingerprint, keep_last, upload
        # A thread that talks to other ranks beside the training needs a channel of its own.
        self._ranks = Ranks(mesh.rank, mesh.world_size, mesh.ranks.timeout) if background else mesh.ranks
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._layout = list(mesh.devices.shape)
        self._pending: Future[None] | None = None

    # --- saving --------------------------------------------------------------------------------------

    def save(self, step: int) -> Path:
        """Save a checkpoint after `step`; in the background if asked (the state of now is copied first). To be called by all ranks."""
        target = self.folder / f"step-{step:08d}"
        self.wait()
        write_model = self._stage_model(self._ranks)
        own, values = self._optimizer.state()
        tensors = {f"optimizer::{name}": one for name, one in own.items()}
        for kind, generator in accelerator.rng_state(self._mesh.device).items():
            name = f"rng::{kind}" if self._mesh.world_size == 1 else f"rng::{kind}@{self._mesh.rank}"
            tensors[name] = outgoing(generator, Part.whole(generator.shape), True)
        state = {
            "step": step,
            "fingerprint": self._fingerprint,
            "layout": self._layout,
            "counters": dict(self.counters),
            "running": dict(self.running),
            "data": self._data.merged(self._mesh.ranks.gather(self._data.state())),
            "optimizer": _merged(self._mesh.ranks.gather(values)),
            "python_random": random.getstate(),
        }
        if self._pool is None:
            self._write(target, write_model, tensors, state)
        else:
            self._pending = self._pool.submit(self._write, target, write_model, staged(tensors), state)
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
        tensors: dict[str, Outgoing],
        state: dict[str, Any],
    ) -> None:
        partial, ranks = self.folder / f".{target.name}.partial", self._ranks
        try:
            ranks.from_main(lambda: _make_empty(partial))
            digests = write_model(partial)
            tensor_digests = write_tensors(tensors, partial / RESUME, "optimizer", ranks=ranks)
            digests |= {f"{RESUME}/{name}": digest for name, digest in tensor_digests.items()}
            own = dict(
                sorted(digests.items())[ranks.rank :: ranks.world_size]
            )  # each rank reads some of the files back
            ranks.on_all(lambda: verify(partial, own))
            ranks.from_main(lambda: self._publish(partial, target, {**state, "digests": digests}))
            if self._upload is not None:
                self._upload(target, ranks)
        except OSError as error:
            self._clean_up(partial)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"no space left for the checkpoint {target}: free some or set `keep_last_n_checkpoints`, then go on "
                    "with `resume_from_checkpoint=true`; earlier checkpoints are whole"
                ) from error
            raise
        except BaseException:
            self._clean_up(partial)
            raise

    def _publish(self, partial: Path, target: Path, state: dict[str, Any]) -> None:
        """Give a checkpoint whose files are all there its name, and let old ones go."""
        _write_synced(partial / RESUME / "state.json", json.dumps(state))
        for folder in (partial / RESUME, partial):  # else a power cut may leave the new name without some of its files
            _sync_folder(folder)
        name_checkpoint(partial, target)
        point_latest(self.folder, target.name)
        if self._keep_last is not None:
            for _, folder in complete_checkpoints(self.folder)[: -self._keep_last]:
                remove_checkpoint(folder)

    def _clean_up(self, partial: Path) -> None:
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)

    # --- resuming ------------------------------------------------------------------------------------

    def restore(self, folder: Path) -> int:
        """Set optimizer, data position, RNG and counters to those of the checkpoint in `folder`; return its step.

        The weights are the caller's to load. Raises UserError where the run it was saved by differs in what decides the
        numbers: base model, trained weights, data, global batch.
        """
        self._mesh.ranks.on_all(lambda: check_same_run(folder, self._fingerprint))
        state = read_state(folder)
        stored = read_stem(folder / RESUME, "optimizer")
        self._optimizer.load_state(
            {n.removeprefix("optimizer::"): t for n, t in stored.items() if n.startswith("optimizer::")},
            state["optimizer"],
            same_layout=state.get("layout", self._layout) == self._layout,
        )
        self._data.load_state(state["data"])
        self.counters = dict(state["counters"])
        self.running.clear()
        self.running |= state.get("running", {})
        accelerator.set_rng_state(self._mesh.device, self._own_generators(stored))
        version, internal, gauss = state["python_random"]
        random.setstate((version, tuple(internal), gauss))
        self.last_saved = state["step"]
        return state["step"]

    def _own_generators(self, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """States of this rank's random generators; on another layout, where the rank had none, those of the first."""
        found = {}
        for ending in ("", "@0", f"@{self._mesh.rank}"):
            for kind in ("cpu", self._mesh.device.type):
                if (name := f"rng::{kind}{ending}") in stored:
                    found[kind] = stored[name].tensor().clone()
        return found


def _merged(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain values of an optimizer, of which a rank may have some only."""
    merged = dict(values[0])
    for key in ("plain", "wrapped", "nested"):
        merged[key] = {slot: value for own in values for slot, value in own[key].items()}
    return merged


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / RESUME).mkdir(parents=True)


# --- the folder --------------------------------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint in `folder`, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if (path / RESUME / "state.json").is_file())


def find_newest(run_folder: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, not yet read; what a killed run left half-done is removed.

    Raises UserError where `latest` names one of which only a part is there.
    """
    folder = run_folder / "checkpoints"
    for partial in [*folder.glob(".step-*.partial"), *folder.glob(".removed-*")]:
        shutil.rmtree(partial, ignore_errors=True)
    _check_named(folder)
    complete = complete_checkpoints(folder)
    return complete[-1][1] if complete else None


def _check_named(folder: Path) -> None:
    """Raise UserError where the checkpoint that `latest` names was complete once and is no more, instead of passing it over."""
    named = follow_latest(folder / "latest")
    if _NAME.fullmatch(named.name) and named.is_dir() and not (named / RESUME / "state.json").is_file():
        raise UserError(
            f"{named} is not complete, {RESUME}/state.json is absent: copy it whole, or remove it, and "
            "`resume_from_checkpoint=true` takes the one before"
        )


def check_digests(checkpoint: Path, ranks: Ranks | None = None, copy_of: str | None = None) -> None:
    """Read a checkpoint's files back, each rank some of them; then `latest` names it. Raises UserError on all for a file that differs.

    copy_of: where else it is.
    """
    ranks = ranks or Ranks()

    def check_own() -> None:
        digests = sorted(read_state(checkpoint)["digests"].items())
        try:
            verify(checkpoint, dict(digests[ranks.rank :: ranks.world_size]))
        except UserError as error:
            cure = f"remove {checkpoint}, and `resume_from_checkpoint=true` takes the one before"
            if copy_of is not None:
                cure = f"remove {checkpoint}, and it is fetched again; or {copy_of}, and `resume_from_checkpoint=true` takes the one before"
            raise UserError(f"{error}; {cure}") from error

    ranks.on_all(check_own)
    ranks.from_main(lambda: point_latest(checkpoint.parent, checkpoint.name))


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
    if key in ("data", "model", "teacher", "reference"):  # digests tell a person nothing
        return f"the {'data or how they are read' if key == 'data' else key} changed"
    return f"{key} was {was}, is now {now}"


def point_latest(folder: Path, name: str) -> None:
    """Make `latest` name a checkpoint, in one step: a reader sees the old name or the new one."""
    temporary = folder / ".latest.partial"
    _write_synced(temporary, name + "\n")
    os.replace(temporary, folder / "latest")
    _sync_folder(folder)


def name_checkpoint(partial: Path, target: Path) -> None:
    """Give a checkpoint whose files are all there its name."""
    if target.exists():  # the same step saved again, after a resume with less to do
        remove_checkpoint(target)
    os.rename(partial, target)
    _sync_folder(target.parent)


def remove_checkpoint(folder: Path) -> None:
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
