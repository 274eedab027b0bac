"""The model that another learns from: what it says at the positions with a label, for every micro-batch of a step.

B batch, T tokens, D hidden size of the teacher, V its vocabulary, N positions with a label, n of these at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tunesmith.configs import distill
from tunesmith.data.batch import Batch
from tunesmith.data.tokenizer import Tokenizer, load_tokenizer
from tunesmith.errors import UserError
from tunesmith.losses.distillation import Guide
from tunesmith.losses.divergence import Divergence, forward_kl, jensen_shannon, reverse_kl, symmetric_kl
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.head import Head, with_label
from tunesmith.nn.part import unsharded
from tunesmith.parallel.pipeline import forward
from tunesmith.training.build import Source
from tunesmith.training.preflight import frozen_layout_problems
from tunesmith.training.vocabulary import Vocabulary, vocabulary_problem

_HIDDEN = "teacher_hidden"


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

    def __init__(self, model: CausalLM, precision: Callable[[], AbstractContextManager[Any]]):
        self.model, self.precision = model, precision

    @torch.no_grad()
    def prepare(self, batches: list[Batch]) -> None:
        """Keep its hidden states (N, D), where they come out."""

        def keep(hidden: Tensor, batch: Batch) -> None:
            batch.extra[_HIDDEN] = with_label(hidden, batch.labels)

        forward(self.model, batches, keep, self.precision)

    @contextmanager
    def guide(self, batch: Batch) -> Iterator[Guide]:
        """Logits from its hidden states: within it the matrix of its head is whole, or what tensor parallelism left of it."""
        own, hidden = self.model.lm_head, batch.extra[_HIDDEN]

        def logits(student: Head, which: slice) -> Tensor:
            return own.logits_beside(student, hidden[which])

        with unsharded(own if own.tied_to is None else own.tied_to):
            yield logits


def check_teacher(config: distill.Distill, student: Source, tokenizer: Tokenizer, teacher: Source) -> None:
    """Before anything is loaded: raise UserError where the layout can't cut the teacher, or it has other tokens than the student."""
    shape = teacher.family.read_config(teacher.hf_config)
    problems = list(frozen_layout_problems("teacher.model", config, shape, bool(config.teacher.quantize)))
    own = _vocabulary(student, tokenizer)
    if problem := vocabulary_problem(own, _vocabulary(teacher), config.tokenizer.add_tokens):
        problems.append(problem)
    if problems:
        raise UserError("\n".join(problems))


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
