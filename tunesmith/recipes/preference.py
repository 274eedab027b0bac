"""Preference tuning: raise the answers that people prefer over those that they reject.

    tune run preference +lora model=my-sft-model dataset.source=pairs.jsonl                      DPO; the reference is the model without its adapters
    tune run preference model=my-sft-model dataset.source=pairs.jsonl loss.type=simpo            all weights, no reference
    tune run preference +qlora model=my-sft-model dataset.source=marked.jsonl loss.type=kto      single answers, marked good or bad

What differs from sft: rows are units of answers that stay together, losses compare them, and most compare with a reference.
The losses themselves are in losses/preference.py: a further one is a function and a line there, and a section of options.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.configs.preference import Preference
from tunesmith.data.batch import IGNORED, Batch
from tunesmith.data.loader import preference_batches, validation_batches
from tunesmith.data.tokenizer import find_tokenizer
from tunesmith.generation.samples import Samples
from tunesmith.losses.preference import PAIRED, UNPAIRED, Answers, Pairs, Unpaired
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.documents import document_sums
from tunesmith.nn.head import Head
from tunesmith.parallel.mesh import LOSS, Mesh
from tunesmith.training.build import build_model, max_sequence_length
from tunesmith.training.optim import Optimizer, build_optimizer
from tunesmith.training.reference import REFERENCE, References, answer_log_probs, write_log_probs
from tunesmith.training.source import find_model
from tunesmith.training.start import start_run
from tunesmith.training.step import Metric, own_batches, train_step, validation_means

Terms = dict[str, tuple[Tensor, str]]
UNITS = {"kl": "answers and mismatched", "rewards": "answers"}
"""What a step is made of, by the statistic of it that the loss takes."""


def main(config: Preference) -> None:
    with start_run(config, "preference") as run:
        source = find_model(config.model)
        tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
        references = References(config, source, tokenizer, run.mesh)
        run.check_fit(source, tokenizer, beside=references.computes_along)
        options: dict[str, Any] = {
            "max_seq_len": max_sequence_length(config, source),
            "units": "pairs" if config.loss.needs_pairs else UNITS[UNPAIRED[config.loss.type].statistic],
            "with_index": config.reference.precompute,
        }
        data = preference_batches(config, tokenizer, run.mesh, **options)
        held_out = validation_batches(config, tokenizer, run.mesh, **options)
        run.note(str(data.report))

        references.compute_once([data, held_out], run.note)
        model = build_model(config, source, tokenizer, run.mesh, run.resume_from)
        optimizer = build_optimizer(model, config, data.total_steps, run.mesh)
        references.attach(model, optimizer.precision)
        fixed = {"loss": config.loss.type, "reference": references.fingerprint}
        run.keep(model, tokenizer, optimizer, data, source, **fixed)
        kind = PairedMethod if config.loss.needs_pairs else UnpairedMethod
        method = kind(model, optimizer, references, run.mesh, run.running)
        samples = Samples(run.folder, model, tokenizer, config.sample_prompts, chat=True, writes=run.mesh.is_main)
        if not run.resume_from:
            samples.write(0)

        for step in run.steps(data.total_steps):
            batches = method.rows(run.next(data.step, step))
            run.log(step, train_step(model, optimizer, batches, method.loss, run.mesh, step, method.prepare))
            if held_out:
                run.validate(step, lambda: method.validation(held_out))
            run.save_if_due(step)

        if not run.stopped:
            samples.write(data.total_steps)
        run.finish()


class Method:
    """A preference loss over the documents of packed rows."""

    def __init__(
        self, model: CausalLM, optimizer: Optimizer, references: References, mesh: Mesh, running: dict[str, float]
    ):
        self.model, self.optimizer, self.references, self.mesh = model, optimizer, references, mesh
        self.running = running
        """Statistics that go on over the run; saved with it."""
        options = vars(references.config.loss).copy()
        self.chunk_size, self.sft_weight = options.pop("chunk_size"), options.pop("sft_weight")
        self.numbers: dict[str, Any] = options

    def rows(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches that the loss is taken over."""
        return batches

    def prepare(self, batches: list[Batch]) -> None:
        self.references.write(batches)

    def prepare_validation(self, batches: list[Batch]) -> None:
        self.references.write(batches, of=1)

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Terms:
        raise NotImplementedError

    def validation(self, held_out: Iterable[list[Batch]]) -> dict[str, float]:
        """Loss and metrics over the held-out rows."""
        steps = map(self.rows, held_out)
        return validation_means(self.model, self.optimizer, steps, self.loss, self.mesh, self.prepare_validation)

    def _documents(self, head: Head, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of log p and number of labels of each document, (B, M)."""
        log_probs = answer_log_probs(head, hidden, batch, self.model.sequence_shards, self.chunk_size)
        return log_probs, self._sums((batch.labels != IGNORED).float(), batch)

    def _sums(self, values: Tensor, batch: Batch) -> Tensor:
        assert batch.documents is not None
        return document_sums(values, batch.documents, batch.most_documents, self.model.sequence_shards)

    def _shared(self, terms: Terms) -> Terms:
        """Ranks that share rows compute the same of whole documents: each counts its share."""
        shards = self.model.sequence_shards
        if shards is None:
            return terms
        return {
            name: Metric(pair[0] / shards.ranks, pair[1])
            if isinstance(pair, Metric)
            else (pair[0] / shards.ranks, pair[1])
            for name, pair in terms.items()
        }


class PairedMethod(Method):
    """Losses of (preferred, rejected): of a row's documents the even ones are preferred, each before its rejected one."""

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Terms:
        log_probs, lengths = self._documents(head, hidden, batch)
        there = lengths[:, ::2] > 0

        def both(values: Tensor) -> tuple[Tensor, Tensor]:
            return values[:, ::2][there], values[:, 1::2][there]

        reference = both(batch.extra[REFERENCE]) if REFERENCE in batch.extra else ()
        pairs = Pairs(*both(log_probs), *both(lengths), *reference)
        losses, chosen, rejected = PAIRED[self.references.config.loss.type].function(pairs, **self.numbers)
        terms: Terms = {"preference_loss": (losses.sum(), "pairs")}
        if self.sft_weight:
            terms["sft_loss"] = (-self.sft_weight * pairs.chosen.sum(), "chosen_tokens")
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "log_probs/chosen": pairs.chosen,
            "log_probs/rejected": pairs.rejected,
        }
        return self._shared(terms | {name: Metric(value.detach().sum(), "pairs") for name, value in metrics.items()})


class UnpairedMethod(Method):
    """Losses of single answers marked good or bad, compared with a statistic of the global batch."""

    POLICY = "policy"
    statistic: float

    @property
    def kind(self) -> Unpaired:
        return UNPAIRED[self.references.config.loss.type]

    def rows(self, batches: list[Batch]) -> list[Batch]:
        """The answers; those to other prompts, from which KTO takes its baseline, are kept for `prepare`."""
        self._others = batches
        if self.kind.statistic == "kl":
            self._others, batches = [one.select(1, 2) for one in batches], [one.select(0, 2) for one in batches]
        for batch in batches:
            is_good = batch.extra["values"] > 0.5
            begins = (batch.positions == 0) & (batch.documents >= 0)  # type: ignore[operator]
            batch.counts["chosen_tokens"] = int((is_good & (batch.labels != IGNORED)).sum())
            batch.counts["desirable"] = int((is_good & begins).sum())
            batch.counts["undesirable"] = int((~is_good & begins).sum())
        return batches

    def prepare(self, batches: list[Batch]) -> None:
        """The reference, and the statistic: over the global batch, so it does not depend on how that was cut."""
        self.references.write(batches)
        total, count = self._measured(batches, of=0)
        if self.kind.statistic == "rewards" and math.isfinite(total):
            new = {"rewards": self.numbers["beta"] * total, "answers": count}
            self.running |= {name: self.running.get(name, 0.0) + value for name, value in new.items()}
        self._set_statistic(total, count)

    def validation(self, held_out: Iterable[list[Batch]]) -> dict[str, float]:
        """With the statistic of all held-out rows, which takes a pass of its own."""
        sums = [0.0, 0.0]
        for batches in held_out:
            own = own_batches(self.model, self.rows(batches), self.mesh)
            self.references.write(own, of=1)
            sums = [a + b for a, b in zip(sums, self._measured(own, of=1))]
        self._set_statistic(*sums)
        return super().validation(held_out)

    def _set_statistic(self, total: float, count: float) -> None:
        if self.kind.statistic == "kl":
            self.statistic = max(0.0, total / max(count, 1.0))
        else:
            seen = self.running or {"rewards": self.numbers["beta"] * total, "answers": count}
            self.statistic = seen["rewards"] / max(seen["answers"], 1.0)

    def _measured(self, batches: list[Batch], of: int) -> tuple[float, float]:
        """(sum of log-ratios, answers) over all ranks, of what the statistic is taken over: without gradients or dropout."""
        measured = batches
        if self.kind.statistic == "kl":
            measured = own_batches(self.model, self._others, self.mesh)
            self.references.write(measured, of)
        write_log_probs(self.model, measured, self.POLICY, self.chunk_size, self.optimizer.precision)
        total, count = 0.0, 0.0
        for batch in measured:
            if self.POLICY in batch.extra:  # on the last stage of a pipeline
                there = self._sums((batch.labels != IGNORED).float(), batch) > 0
                total += float((batch.extra[self.POLICY] - batch.extra[REFERENCE])[there].sum())
                count += int(there.sum())
        # Ranks that share rows have counted the same documents.
        total, count = (one / self.mesh.size("cp") for one in self.mesh.sum([total, count], LOSS))
        return total, count

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Terms:
        log_probs, lengths = self._documents(head, hidden, batch)
        there = lengths > 0
        is_good = self._sums(batch.extra["values"] * (batch.labels != IGNORED), batch)[there] > 0.5 * lengths[there]
        reference = batch.extra[REFERENCE][there] if REFERENCE in batch.extra else None
        answers = Answers(log_probs[there], lengths[there], is_good, reference)
        statistic = torch.tensor(self.statistic, device=hidden.device)
        losses, rewards = self.kind.function(answers, statistic, **self.numbers)
        terms: Terms = {"preference_loss": (losses.sum(), "answers")}
        if self.sft_weight:
            terms["sft_loss"] = (-self.sft_weight * answers.logps[is_good].sum(), "chosen_tokens")
        rewards = rewards.detach()
        terms["rewards/chosen"] = Metric(rewards[is_good].sum(), "desirable")
        terms["rewards/rejected"] = Metric(rewards[~is_good].sum(), "undesirable")
        terms[{"kl": "kl", "rewards": "baseline"}[self.kind.statistic]] = Metric(statistic * len(rewards), "answers")
        return self._shared(terms)
