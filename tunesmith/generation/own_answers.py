"""Batches whose answers the model writes itself: on-policy distillation (GKD, arXiv 2306.13649).

All ranks write all answers of a step together, whatever they share: they then pass through the model equally often, and which
answers come depends on neither layout nor micro-batch (but for rounding, and what a draw makes of it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.batch import IGNORED, Batch
from tunesmith.data.collate import EMPTY_ROW, TokenRow, collate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.exact import sequence_row
from tunesmith.generation.sampling import Sampling
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.mesh import Mesh

OWN = "own_answers"
"""What a batch counts: rows whose answer the model wrote."""


@dataclass(frozen=True)
class OwnAnswers:
    """Which steps the model writes the answers of, and how."""

    tokenizer: Tokenizer
    mesh: Mesh
    ratio: float
    """Share of the steps."""
    sampling: Sampling
    batch_size: int
    """Answers written at a time."""
    max_seq_len: int
    seed: int

    def chosen(self, step: int) -> bool:
        """Whether step `step` is one of them: by (seed, step) alone."""
        return _number(self.seed, step, "chosen") < self.ratio * 2**64

    def of(self, model: CausalLM, batches: list[Batch], step: int) -> list[Batch]:
        """The micro-batches of a chosen step with the last answer of each conversation written anew, others as they are.

        A row's draws depend on (seed, step, the row's place in the step).
        """
        if not self.chosen(step):
            return batches
        own = dict(self._prompts(batches))
        prompts = {place: ids for of_rank in self.mesh.ranks.gather(own) for place, ids in of_rank.items()}
        places = sorted(prompts)
        sampling = replace(self.sampling, seed=_number(self.seed, step, "drawn"))
        completions = generate_completions(
            model,
            self.tokenizer,
            [prompts[place] for place in places],
            sampling,
            self.batch_size,
            agree=self.mesh.as_on_main,
        )
        answers = {place: completion.ids for place, completion in zip(places, completions)}
        return list(self._rewritten(batches, own, answers))

    def _prompts(self, batches: list[Batch]) -> Iterator[tuple[int, list[int]]]:
        """(place in the step, tokens before the last answer) of each of this rank's rows that has one."""
        number = 0
        for batch in batches:
            for inputs, labels in zip(batch.input_ids, batch.labels):
                if (start := _last_answer(labels)) is not None:
                    yield number * self.mesh.dp_size + self.mesh.dp_rank, inputs[: start + 1].tolist()
                number += 1

    def _rewritten(
        self, batches: list[Batch], prompts: dict[int, list[int]], answers: dict[int, list[int]]
    ) -> Iterator[Batch]:
        number = 0
        for batch in batches:
            rows = []
            for _ in batch.input_ids:
                place = number * self.mesh.dp_size + self.mesh.dp_rank
                rows.append(self._row(prompts[place], answers[place]) if place in prompts else EMPTY_ROW)
                number += 1
            made = collate(rows, self.tokenizer.pad_id, False, self.max_seq_len)
            made.counts[OWN] = sum(len(row) > 0 for row in rows)
            yield made

    def _row(self, prompt: list[int], answer: list[int]) -> TokenRow:
        """At most max_seq_len inputs, the last token being a label only."""
        return sequence_row(prompt, answer[: self.max_seq_len + 1 - len(prompt)])


def _last_answer(labels: Tensor) -> int | None:
    """Where the last run of labels (T,) begins."""
    known = torch.nonzero(labels != IGNORED).squeeze(-1)
    if not len(known):
        return None
    seams = torch.nonzero(known.diff() > 1).squeeze(-1)
    return int(known[seams[-1] + 1 if len(seams) else 0])


def _number(seed: int, step: int, what: str) -> int:
    """Drawn evenly from the 64-bit ones."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{what}".encode()).digest()[:8], "little")
