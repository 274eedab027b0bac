"""The model that another learns from: what it says at the positions with a label, for every micro-batch of a step.

B batch, T tokens, D hidden size of the teacher, V its vocabulary, N positions with a label, n of these at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.configs import distill
from tunesmith.data.batch import Batch
from tunesmith.data.loader import Batches
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.errors import UserError
from tunesmith.losses.distillation import Guide, TopK
from tunesmith.losses.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl, symmetric_kl
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head, with_label
from tunesmith.nn.part import unsharded
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.pipeline import forward
from tunesmith.training.build import build_frozen
from tunesmith.training.preflight import frozen_layout_problems
from tunesmith.training.source import Source
from tunesmith.training.top_k import INDEX, Note, TopKStore, open_store
from tunesmith.training.vocabulary import Vocabulary, vocabulary_problem

_HIDDEN, _IDS, _LOG_PROBS = "teacher_hidden", "teacher_ids", "teacher_log_probs"


class Teacher(Protocol):
    """Where a student's guides come from."""

    def prepare(self, batches: list[Batch]) -> None:
        """Write into the micro-batches of a step what `guide` needs."""
        ...

    def guide(self, batch: Batch) -> AbstractContextManager[Guide]:
        """What the teacher says where this batch has labels."""
        ...


class LiveTeacher:
    """A teacher that computes along: the whole model for all micro-batches of a step at once, its head when the loss asks."""

    def __init__(self, model: CausalLM):
        self.model = model

    @torch.no_grad()
    def prepare(self, batches: list[Batch]) -> None:
        """Keep its hidden states (N, D), where they come out."""

        def keep(hidden: Tensor, batch: Batch) -> None:
            batch.extra[_HIDDEN] = with_label(hidden, batch.labels)

        forward(self.model, batches, keep, nullcontext)

    @contextmanager
    def guide(self, batch: Batch) -> Iterator[Guide]:
        """Logits from its hidden states: within it the matrix of its head is whole, or what tensor parallelism left of it."""
        own, hidden = self.model.lm_head, batch.extra[_HIDDEN]

        def logits(student: Head, which: slice) -> Tensor:
            return own.logits_beside(student, hidden[which])

        with unsharded(own if own.tied_to is None else own.tied_to):
            yield logits


class CachedTeacher:
    """A teacher that has spoken already: its likeliest tokens are read from the cache."""

    def __init__(self, store: TopKStore):
        self.store = store

    def prepare(self, batches: list[Batch]) -> None:
        for batch in batches:
            places = with_label(batch.extra[INDEX], batch.labels)
            ids, log_probs = self.store.read(places.cpu().numpy())
            for name, values in ((_IDS, ids), (_LOG_PROBS, log_probs)):
                batch.extra[name] = torch.from_numpy(values).to(batch.labels.device)

    @contextmanager
    def guide(self, batch: Batch) -> Iterator[Guide]:
        ids, log_probs = batch.extra[_IDS], batch.extra[_LOG_PROBS]
        yield lambda _, which: TopK(ids[which].long(), log_probs[which])


def open_teachers(
    config: distill.Distill,
    source: Source,
    tokenizer: Tokenizer,
    mesh: Mesh,
    data: Batches,
    held_out: Batches | None,
    shared: int,
    note: Note,
) -> tuple[Teacher, Teacher]:
    """What guides training, and what guides validation; where the cache does, the teacher itself is loaded only to fill it.

    shared: tokens that teacher and student both have.
    """
    loaded: list[CausalLM] = []

    def load() -> CausalLM:
        if not loaded:
            loaded.append(build_frozen(config, source, tokenizer, mesh, config.teacher.quantize))
        return loaded[0]

    if config.teacher.cache_top_k is None:
        live = LiveTeacher(load())
        return live, live

    def cached(rows: Batches) -> Teacher:
        key = [source.fingerprint, config.teacher.quantize, config.dtype, config.divergence.temperature, shared]
        return CachedTeacher(open_store(key, config, rows, load, mesh, shared, note))

    training = cached(data)
    return training, training if held_out is None else cached(held_out)


def check_teacher(config: distill.Distill, student: Source, tokenizer: Tokenizer, teacher: Source) -> None:
    """Before anything is loaded: raise UserError where the layout can't cut the teacher, or it has other tokens than the student."""
    shape = teacher.family.read_config(teacher.hf_config)
    problems = list(frozen_layout_problems("teacher.model", config, shape, bool(config.teacher.quantize)))
    own = _vocabulary(student, tokenizer)
    if problem := vocabulary_problem(own, _vocabulary(teacher), config.tokenizer.add_tokens):
        problems.append(f"`teacher.model`: {problem}")
    if problems:
        raise UserError("\n".join(problems))


def shared_tokens(student: Source, teacher: Source, tokenizer: Tokenizer) -> int:
    """How many tokens both have: the first rows of both embeddings, which grow with the tokenizer."""
    rows = (source.family.read_config(source.hf_config).vocab_size for source in (student, teacher))
    return min(max(count, tokenizer.vocab_size) for count in rows)


def _vocabulary(source: Source, tokenizer: Tokenizer | None = None) -> Vocabulary:
    """Of the model and its own tokenizer, or the one given."""
    rows = source.family.read_config(source.hf_config).vocab_size
    try:
        tokenizer = tokenizer or load_tokenizer(source.tokenizer)
    except UserError:  # a folder without one
        return Vocabulary(source.name, rows)
    backend = tokenizer.backend
    added = frozenset(token.content for token in backend.get_added_tokens_decoder().values())
    return Vocabulary(source.name, rows, backend.get_vocab(with_added_tokens=True), added)


def build_divergence(config: distill.Divergence) -> Divergence:
    if isinstance(config, distill.JensenShannon):
        return jensen_shannon(config.beta)
    if isinstance(config, distill.SymmetricKL):
        return symmetric_kl(config.sym_kd_ratio)
    return forward_kl if isinstance(config, distill.ForwardKL) else reverse_kl
