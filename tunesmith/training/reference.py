"""The model that a preference method compares with: adapters switched off, a second copy, or log-probabilities kept on disk.

B rows, T tokens, M documents a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.configs.preference import Preference
from tunesmith.configs.weights import LoRAWeights
from tunesmith.data.batch import Batch
from tunesmith.data.cache import cache_folder
from tunesmith.data.loader import Batches
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.nn.documents import document_sums
from tunesmith.nn.head import Head
from tunesmith.nn.lora import adapters_off
from tunesmith.nn.sequence_shards import SequenceShards
from tunesmith.parallel.mesh import LOSS, Mesh
from tunesmith.parallel.pipeline import forward
from tunesmith.training.build import build_frozen
from tunesmith.training.preflight import check_reference
from tunesmith.training.source import Source, find_model
from tunesmith.training.step import own_batches

REFERENCE = "reference"
"""Where a batch's `extra` holds the reference's log-probabilities (B, M)."""


def answer_log_probs(
    head: Head, hidden: Tensor, batch: Batch, shards: SequenceShards | None, chunk_size: int
) -> Tensor:
    """Sum of log p over the labels of each document: (B, M) float32."""
    assert batch.documents is not None
    log_probs = head.log_probs(hidden, batch.labels, chunk_size)
    return document_sums(log_probs, batch.documents, batch.most_documents, shards)


def write_log_probs(
    model: CausalLM,
    batches: list[Batch],
    name: str,
    chunk_size: int,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Write the documents' log-probabilities under `model`, without gradients or dropout, into every batch's `extra[name]`.

    On the ranks that have the last stage of a pipeline, which are those that compute losses.
    """

    def write(hidden: Tensor, batch: Batch) -> None:
        batch.extra[name] = answer_log_probs(model.lm_head, hidden, batch, model.sequence_shards, chunk_size)

    was_training = model.training
    with torch.no_grad():
        model.eval()
        forward(model, batches, write, context)
        model.train(was_training)


class References:
    """Writes `extra["reference"]`, the log-probabilities (B, M) under the reference, into the batches of a step.

    First `compute_once`, while no other model is there, if that was asked for; then `attach` to the trained model. A loss
    that compares with nothing gets nothing.
    """

    def __init__(self, config: Preference, source: Source, tokenizer: Tokenizer, mesh: Mesh):
        self.config, self._tokenizer, self._mesh = config, tokenizer, mesh
        name = config.reference.model
        self._source = find_model(name) if name else source
        check_reference(source.name, _shape(source), self._source.name, _shape(self._source))
        self._is_base = name is None and isinstance(config.weights, LoRAWeights)
        """Whether the reference is the trained model without its adapters."""
        self._kept: list[Tensor] = []
        self._model: CausalLM | None = None
        self._shards: SequenceShards | None = None
        self._precision: Callable[[], AbstractContextManager] = nullcontext

    @property
    def computes_along(self) -> Source | None:
        """The model whose forward pass belongs to every step; None where there is none, or it was computed before."""
        along = self.config.loss.needs_reference and not self.config.reference.precompute
        return self._source if along else None

    @property
    def fingerprint(self) -> str | None:
        """Changes with what is compared with; None where nothing is."""
        if not self.config.loss.needs_reference:
            return None
        return f"{self._source.fingerprint}-{self._quantize}"

    def compute_once(self, sources: Iterable[Batches | None], say: Callable[[str], None]) -> None:
        """If `reference.precompute` is set: the log-probabilities of all labels in each of `sources`, for `write` to look up."""
        if self.config.loss.needs_reference and self.config.reference.precompute:
            self._kept = [self._computed(rows, say) for rows in sources if rows is not None]

    def attach(self, model: CausalLM, precision: Callable[[], AbstractContextManager]) -> None:
        """Take the trained model as the reference, with its adapters off, or load a second one beside it."""
        self._shards, self._precision = model.sequence_shards, precision
        if self.config.loss.needs_reference and not self._kept:
            self._model = model if self._is_base else self._second()

    def write(self, batches: list[Batch], of: int = 0) -> None:
        """`of`: the number of the source, among those given to `compute_once`, that the batches come from."""
        if self._kept:
            for batch in batches:
                assert batch.documents is not None
                places = batch.extra["index"]
                values = self._kept[of][places.clamp(min=0).cpu()].to(places.device).masked_fill(places < 0, 0)
                batch.extra[REFERENCE] = document_sums(values, batch.documents, batch.most_documents, self._shards)
        elif self._model is not None:
            with adapters_off(self._model) if self._is_base else nullcontext():
                write_log_probs(self._model, batches, REFERENCE, self.config.loss.chunk_size, self._precision)

    def _second(self) -> CausalLM:
        """A base in 4 bits has a reference in 4 bits, as the one with its adapters off is."""
        return build_frozen(self.config, self._source, self._tokenizer, self._mesh, self._quantize)

    @property
    def _quantize(self) -> str | None:
        own = self.config.weights.quantize_base if isinstance(self.config.weights, LoRAWeights) else None
        return self.config.reference.quantize or (own if self._is_base else None)

    # --- computed once -------------------------------------------------------------------------------

    def _computed(self, rows: Batches, say: Callable[[str], None]) -> Tensor:
        """The log-probability of every label in the sources of `rows`, (places,) float32 on the host.

        They come from the cache folder where they were computed before: by the same model in the same number type on the
        same tokens.
        """
        assert self._source.folder is not None
        made_of = [
            self._source.fingerprint,
            self.config.dtype,
            self._quantize,
            rows.index_fingerprint,
        ]
        name = hashlib.blake2b(repr(made_of).encode(), digest_size=20).hexdigest()
        file = cache_folder().parent / "log_probs" / f"{name}.npy"
        if all(self._mesh.ranks.gather(_is_whole(file, rows.num_indexed))):
            say(f"the reference's log-probabilities were computed before: {file}")
            return torch.from_numpy(np.load(file))
        say("computing the reference's log-probabilities, once for all rows")
        model, tokens = self._second(), torch.zeros(rows.num_indexed)

        def write(hidden: Tensor, batch: Batch) -> None:
            log_probs, places = (
                model.lm_head.log_probs(hidden, batch.labels, self.config.loss.chunk_size),
                batch.extra["index"],
            )
            tokens[places[places >= 0].cpu()] = log_probs[places >= 0].float().cpu()

        with torch.no_grad():
            for batches in rows.each_row_once():
                forward(model, own_batches(model, batches, self._mesh), write, self._precision)
        self._mesh.sum_tensor(tokens, LOSS)
        if self._mesh.is_main and (problem := _save(file, tokens)):
            say(
                f"the log-probabilities are not kept for the next run: {file.parent} can't be written ({problem}); set TUNESMITH_CACHE to a folder that can"
            )
        self._mesh.ranks.barrier()
        return tokens


def _shape(source: Source) -> tuple[Family, DecoderConfig]:
    return source.family, source.family.read_config(source.hf_config)


def _is_whole(file: Path, places: int) -> bool:
    try:
        return np.load(file, mmap_mode="r").shape == (places,)
    except (OSError, ValueError):
        return False


def _save(file: Path, tokens: Tensor) -> str | None:
    """Under its name only when it is whole. A folder that can't be written costs the cache, not the run: returns why."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            np.save(opened, tokens.numpy())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return error.strerror or str(error)
    return None
