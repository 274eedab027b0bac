"""A teacher's likeliest tokens at every position with a label, computed once and kept on disk: keyed by content, written whole or not at all.

n positions, K tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.configs.distill import Distill
from tunesmith.data.batch import Batch
from tunesmith.data.cache import cache_folder, digest
from tunesmith.data.loader import Batches
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head, with_label
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.pipeline import forward
from tunesmith.training.step import own_batches

INDEX = "index"
"""Of a batch's extra tensors the one that says where its tokens stand among all of the data (data.collate)."""
_VERSION = 1
Note = Callable[[str], None]
Said = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places (n,), ids (n, K) int32, log-probabilities (n, K + 1) float32."""


class TopKStore:
    """What is on disk, read place by place."""

    def __init__(self, folder: Path):
        about = json.loads((folder / "about.json").read_text())
        count, self.k, columns = about["positions"], about["k"], about["columns"]
        self._rows = np.fromfile(folder / "rows", np.int64)
        self._ids = np.memmap(folder / "ids", np.int32, "r", shape=(count, self.k)) if count else None
        self._log_probs = np.memmap(folder / "log_probs", np.float32, "r", shape=(count, columns)) if count else None
        self._empty = np.empty((0, self.k), np.int32), np.empty((0, columns), np.float32)

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n, K) int32 and log-probabilities (n, K + 1) float32 of these tokens of the data, which all predict a label."""
        if not len(places) or self._ids is None or self._log_probs is None:
            return self._empty
        rows = self._rows[places]
        assert rows.min() >= 0, "the cache lacks a position with a label"
        return self._ids[rows], self._log_probs[rows]


class _Writer:
    """Adds to files of a folder under a temporary name, which `finish` renames."""

    def __init__(self, root: Path, name: str, tokens: int):
        root.mkdir(parents=True, exist_ok=True)
        self.target = root / name
        self.folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        self.rows = np.full(tokens, -1, np.int64)
        self.files = {part: (self.folder / part).open("wb") for part in ("ids", "log_probs")}
        self.count, self.shape = 0, (0, 0)

    def add(self, said: Sequence[Said]) -> None:
        for places, ids, log_probs in said:
            self.rows[places] = np.arange(self.count, self.count + len(places))
            self.count, self.shape = self.count + len(places), (ids.shape[1], log_probs.shape[1])
            self.files["ids"].write(ids.tobytes())
            self.files["log_probs"].write(log_probs.tobytes())

    def finish(self) -> None:
        self.rows.tofile(self.folder / "rows")
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        digests = {part: digest(self.folder / part) for part in ("rows", *self.files)}
        about = {"version": _VERSION, "positions": self.count, "k": self.shape[0], "columns": self.shape[1]}
        (self.folder / "about.json").write_text(json.dumps({**about, "digests": digests}))
        if not _is_whole(self.target):  # else another run was quicker
            shutil.rmtree(self.target, ignore_errors=True)
            os.rename(self.folder, self.target)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_store(
    key: Sequence[Any],
    config: Distill,
    data: Batches,
    load: Callable[[], CausalLM],
    mesh: Mesh,
    shared: int,
    note: Note,
) -> TopKStore:
    """What the teacher says to all rows of `data`, from the cache, else made by the model that `load` gives and written to it.

    key: what the numbers depend on beside the data. shared: only the first so many tokens count.
    """
    k = min(config.teacher.cache_top_k or shared, shared)
    digested = json.dumps([_VERSION, k, *key, data.index_fingerprint], sort_keys=True).encode()
    root, name = cache_folder("teachers"), hashlib.blake2b(digested, digest_size=20).hexdigest()
    if not all(mesh.ranks.gather(_is_whole(root / name))):
        try:
            _fill(root, name, config, data.each_row_once(), load(), k, mesh, shared, note)
        except OSError as error:
            raise UserError(
                f"the teacher's log-probabilities can't be written to {root} ({error.strerror or error}): make room there, set "
                "TUNESMITH_CACHE to another folder, lower `teacher.cache_top_k`, or set it to null"
            ) from error
    return TopKStore(root / name)


def _is_whole(folder: Path) -> bool:
    try:
        about = json.loads((folder / "about.json").read_text())
        parts = about["digests"].items()
        return about["version"] == _VERSION and all(digest(folder / part) == known for part, known in parts)
    except (OSError, ValueError, KeyError):
        return False


def _fill(
    root: Path, name: str, config: Distill, data: Batches, model: CausalLM, k: int, mesh: Mesh, shared: int, note: Note
) -> None:
    """All ranks compute, and on each machine one writes what all have computed."""
    note(f"the teacher answers once, in {len(data)} steps; what it says is kept in {root / name}")
    writes = os.environ.get("LOCAL_RANK", "0") == "0"
    opened: list[_Writer] = []

    def on_writers(act: Callable[[], None]) -> None:
        mesh.ranks.on_all(lambda: act() if writes else None)

    def add(said: list[Said]) -> None:
        everything = mesh.ranks.gather(said if mesh.index("tp") == 0 else [])
        on_writers(lambda: opened[0].add([one for of_rank in everything for one in of_rank]))

    try:
        on_writers(lambda: opened.append(_Writer(root, name, data.num_indexed)))
        for number, batches in enumerate(data, 1):
            said: list[Said] = []
            _listen(model, own_batches(model, batches, mesh), said, config, k, shared)
            add(said)
            if number * 10 // len(data) > (number - 1) * 10 // len(data):
                note(f"the teacher has answered {number} of {len(data)} steps")
        on_writers(lambda: opened[0].finish())
    finally:
        data.close()
        for writer in opened:
            writer.close()


@torch.no_grad()
def _listen(model: CausalLM, batches: list[Batch], said: list[Said], config: Distill, k: int, shared: int) -> None:
    """Add what the model says of these micro-batches, on the ranks where hidden states come out."""

    def keep(hidden: Tensor, batch: Batch) -> None:
        places, rows = (with_label(values, batch.labels) for values in (batch.extra[INDEX], hidden))
        size = config.loss.chunk_size or max(len(rows), 1)
        for place, part in zip(places.split(size), rows.split(size)):
            ids, log_probs = likeliest(model.lm_head, part, k, shared, config.divergence.temperature)
            said.append((place.cpu().numpy(), ids.to(torch.int32).cpu().numpy(), log_probs.cpu().numpy()))

    forward(model, batches, keep, nullcontext)


def likeliest(head: Head, hidden: Tensor, k: int, shared: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Of hidden states (n, D) the K likeliest of the first `shared` tokens: ids (n, K), and their log-probabilities with that of all others
    together behind them (n, K + 1); (n, K) where there are no others."""
    log_probs = torch.log_softmax(head.precise_logits(hidden)[:, :shared] / temperature, -1)
    values, ids = log_probs.topk(k)
    if k < shared:
        others = log_probs.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        values = torch.cat([values, others], -1)
    return ids, values
