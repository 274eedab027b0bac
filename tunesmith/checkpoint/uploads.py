"""A run whose output_dir is a URL: it works in a folder here, and every complete checkpoint is brought there.

    URL/checkpoints/step-00000100/…          its files, and last of all resume/state.json: without it there is no checkpoint
    URL/checkpoints/latest                   written after it
    URL/metrics.jsonl, report.html, …        as they are with the newest checkpoint, and at the end
    URL/.lock                                the process that came last: an earlier one that still runs writes no more

Here, resume/.uploaded marks a checkpoint that is there. One that is marked and is not there any more was removed by
somebody, and is forgotten here, too; one that is not marked and newer than all there is what a killed run left to upload.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.resume import RESUME, complete_checkpoints, name_checkpoint, remove_checkpoint
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import Ranks
from tunesmith.remote import RemoteFolder

LOCK = ".lock"
_CHECKPOINTS = "checkpoints/"
_STATE = f"{RESUME}/state.json"
_MARK = f"{RESUME}/.uploaded"


class Uploads:
    """Brings what a run saves in `folder` to `url`, and back. Errors are UserErrors that say where the run's files are here.

    refresh: called before the files beside the checkpoints are uploaded.
    """

    def __init__(
        self, url: str, folder: Path, keep_last: int | None = None, refresh: Callable[[], object] = lambda: None
    ):
        self.url, self.folder = url.rstrip("/"), folder
        self._remote, self._keep_last, self._refresh = RemoteFolder(url), keep_last, refresh
        self._record = {"host": platform.node(), "pid": os.getpid(), "claim": uuid.uuid4().hex}
        self._uploaded: dict[str, tuple[int, int]] = {}
        """{file beside the checkpoints: (bytes, time of change) when it was uploaded}."""

    def place(self, path: Path) -> str:
        """Where a file or folder of the run folder is, or will be, there."""
        return f"{self.url}/{path.relative_to(self.folder)}"

    # --- whose folder it is --------------------------------------------------------------------------

    def claimed_by(self) -> dict[str, Any]:
        """The record of the process that writes there, or wrote and did not come to let go."""
        return _parsed(self._remote.read(LOCK)) or {}

    def check_empty(self) -> None:
        """Raise UserError where a run that does not resume would meet another's files; what is left here of one that is gone is removed."""
        if any(not _is_hidden(name) for name in self._remote.files()):
            raise UserError(
                f"output_dir {self.url} is not empty: set `resume_from_checkpoint=true` to go on with that run, or choose another"
            )
        unsaved = [path for _, path in complete_checkpoints(self.folder / "checkpoints") if not self.is_there(path)]
        if unsaved:
            raise UserError(
                f"output_dir {self.url} is empty, but {unsaved[-1]} was saved for it and never got there: "
                f"set `resume_from_checkpoint=true` to go on with that run, or remove {self.folder}"
            )
        self._clear()

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def take(self, launch: str | None, resumes: bool, ranks: Ranks) -> None:
        """Write there who writes there from now on. A run that resumes gets the newest checkpoint, and what lies beside it, unless it is here."""
        wanted = ranks.from_main(lambda: self._take(launch, resumes))
        if wanted is None:
            return
        name, sizes = wanted
        partial = self.folder / "checkpoints" / f".{name}.partial"

        def fetch() -> None:
            for file in _share(sizes, ranks):
                self._remote.download(f"{_CHECKPOINTS}{name}/{file}", partial / file)

        ranks.on_all(fetch)
        ranks.from_main(lambda: self._have(partial, name))

    def _take(self, launch: str | None, resumes: bool) -> tuple[str, dict[str, int]] | None:
        """The newest checkpoint there and the sizes of its files, if it must be fetched."""
        self._remote.write(LOCK, json.dumps(self._record | {"launch": launch}).encode())
        if not resumes:
            return None
        there = self._checkpoints()
        states = {name: self._remote.read(f"{_CHECKPOINTS}{name}/{_STATE}") for name in there}
        for name in [name for name in there if _parsed(states[name]) is None]:  # what a killed run left half-done
            self._remove(name, there.pop(name))
        whole = [name for name in there if {*(_parsed(states[name]) or {})["digests"]} <= {*there[name]}]
        here = {path.name: path for _, path in complete_checkpoints(self.folder / "checkpoints")}
        for name, path in list(here.items()):
            if name in whole and (path / _STATE).read_bytes() == states[name]:
                (path / _MARK).touch()
            elif self.is_there(path):
                remove_checkpoint(here.pop(name))
        newest = max(whole, key=_step, default=None)
        if newest is None and not here:
            self._clear()
        if newest is None or any(_step(name) > _step(newest) for name in here):
            return None
        if newest in here and self.is_there(here[newest]):
            return None
        shutil.rmtree(self.folder / "checkpoints" / f".{newest}.partial", ignore_errors=True)
        return newest, there[newest]

    def _have(self, partial: Path, name: str) -> None:
        """The checkpoint has been fetched: so are the files beside it, and it gets its name."""
        for file in self._remote.files():
            if not file.startswith(_CHECKPOINTS) and not _is_hidden(file):
                self._remote.download(file, self.folder / file)
        (partial / _MARK).touch()
        name_checkpoint(partial, partial.with_name(name))

    def let_go(self) -> None:
        """The run has ended: the next one is no restart of it."""
        with contextlib.suppress(UserError):  # it only helps
            if self.claimed_by().get("claim") == self._record["claim"]:
                self._remote.write(LOCK, b"{}")

    # --- what is saved -------------------------------------------------------------------------------

    def is_there(self, checkpoint: Path) -> bool:
        """Whether a checkpoint was uploaded whole, or fetched."""
        return (checkpoint / _MARK).is_file()

    def push(self, checkpoint: Path, ranks: Ranks) -> None:
        """Upload a complete checkpoint, each rank a share of its files; then let old ones go. To be called by all ranks."""
        place = f"{_CHECKPOINTS}{checkpoint.name}"
        try:
            sizes = ranks.from_main(lambda: self._begin(checkpoint, place))

            def upload() -> None:
                for file in _share(sizes, ranks):
                    self._remote.upload(checkpoint / file, f"{place}/{file}")

            ranks.on_all(upload)
            ranks.from_main(lambda: self._complete(checkpoint, place))
        except UserError as error:
            raise UserError(
                f"{error}; the checkpoint is whole in {checkpoint}, and `resume_from_checkpoint=true` on this machine uploads it and goes on"
            ) from error

    def finish(self, newest: Path) -> None:
        """Upload what changed since the last checkpoint, and let go of older ones that a kill left there."""
        self._push_files()
        self._let_old_ones_go(newest.name)

    def _push_files(self) -> None:
        """Upload the files beside the checkpoints that have changed."""
        self._check_claim()
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if name.startswith(_CHECKPOINTS) or _is_hidden(name) or path.suffix == ".tmp" or not path.is_file():
                continue
            changed = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._uploaded.get(name) != changed:
                self._remote.write(name, path.read_bytes())  # not the file itself, which may grow meanwhile
                self._uploaded[name] = changed

    def _begin(self, checkpoint: Path, place: str) -> dict[str, int]:
        """Make room for a checkpoint; the sizes of the files to be uploaded, but for the last."""
        self._check_claim()
        if before := self._remote.files(f"{place}/"):  # the same step saved again, or what was cut off
            self._remove(checkpoint.name, {name.removeprefix(f"{place}/"): size for name, size in before.items()})
        files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
        return {
            name: path.stat().st_size
            for name, path in files.items()
            if name != _STATE and not path.name.startswith(".")
        }

    def _complete(self, checkpoint: Path, place: str) -> None:
        self._refresh()
        self._push_files()
        self._remote.write(f"{place}/{_STATE}", (checkpoint / _STATE).read_bytes())
        self._remote.write(f"{_CHECKPOINTS}latest", f"{checkpoint.name}\n".encode())
        (checkpoint / _MARK).touch()
        self._let_old_ones_go(checkpoint.name)

    def _let_old_ones_go(self, newest: str) -> None:
        if self._keep_last is not None:
            there = self._checkpoints()
            so_far = sorted((name for name in there if _step(name) <= _step(newest)), key=_step)
            for name in so_far[: -self._keep_last]:
                self._remove(name, there[name])

    def _check_claim(self) -> None:
        holder = self.claimed_by()
        if holder.get("claim", self._record["claim"]) != self._record["claim"]:
            raise UserError(
                f"another run has taken over {self.url} (process {holder.get('pid')} on {holder.get('host')}), and this one ends"
            )

    # --- what is there -------------------------------------------------------------------------------

    def _checkpoints(self) -> dict[str, dict[str, int]]:
        """{checkpoint, complete or not: {file: bytes}}."""
        found: dict[str, dict[str, int]] = {}
        for name, size in self._remote.files(_CHECKPOINTS).items():
            checkpoint, _, file = name.removeprefix(_CHECKPOINTS).partition("/")
            if file and checkpoint.startswith("step-") and _step(checkpoint) >= 0:
                found.setdefault(checkpoint, {})[file] = size
        return found

    def _remove(self, checkpoint: str, files: Mapping[str, int]) -> None:
        """The file that makes it one first: what is half removed is never taken for a checkpoint."""
        self._remote.remove(f"{_CHECKPOINTS}{checkpoint}/{name}" for name in sorted(files, key=lambda n: n != _STATE))


def _share(sizes: Mapping[str, int], ranks: Ranks) -> list[str]:
    """This rank's part of the files, of about as many bytes as the others'."""
    loads, own = [0] * ranks.world_size, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[name]
        if rank == ranks.rank:
            own.append(name)
    return own


def _step(checkpoint: str) -> int:
    number = checkpoint.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    """The object in a file; None where it is absent, or cut off."""
    try:
        found = json.loads(content) if content else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
