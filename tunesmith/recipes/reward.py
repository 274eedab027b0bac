"""Models that score: rewards from preferred answers, classes of texts, steps of an answer.

tune run reward model=Qwen/Qwen3-0.6B dataset.source=pairs.jsonl                                        rewards (Bradley–Terry)
tune run reward +lora model=Qwen/Qwen3-8B dataset.source=pairs.jsonl centring_coefficient=0.01          small adapters and the head
tune run reward task=classification model=… dataset.source=texts.jsonl dataset.label_names='[bad,good]'  one class a text
tune run reward task=process model=… dataset.source=steps.jsonl                                         right or wrong, each step

The checkpoint is what transformers calls a model for sequence classification, or for token classification (process).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.configs.reward import Reward
from tunesmith.data.batch import IGNORED, Batch
from tunesmith.data.loader import reward_batches, validation_batches
from tunesmith.data.tokenizer import find_tokenizer
from tunesmith.losses.reward import bradley_terry, class_cross_entropy
from tunesmith.nn.documents import document_sums
from tunesmith.nn.score import ScoreHead
from tunesmith.nn.sequence_shards import SequenceShards
from tunesmith.training.build import build_model, max_sequence_length
from tunesmith.training.optim import build_optimizer
from tunesmith.training.source import as_classifier, find_model
from tunesmith.training.start import start_run
from tunesmith.training.step import LossFunction, Metric, train_step, validation_means


def main(config: Reward) -> None:
    with start_run(config, "reward") as run:
        source = find_model(config.model, classifier=True)
        tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
        source = as_classifier(source, config.task, config.labels, tokenizer.pad_id)
        config.name_classes(source.label_names)
        run.check_fit(source, tokenizer)
        length = max_sequence_length(config, source)
        data = reward_batches(config, tokenizer, run.mesh, max_seq_len=length, task=config.task)
        held_out = validation_batches(config, tokenizer, run.mesh, max_seq_len=length, task=config.task)
        run.note(str(data.report))

        model = build_model(config, source, tokenizer, run.mesh, run.resume_from)
        optimizer = build_optimizer(model, config, data.total_steps, run.mesh)
        run.keep(model, tokenizer, optimizer, data, source)
        loss = (
            pair_loss(config.centring_coefficient, model.sequence_shards) if config.task == "preference" else class_loss
        )

        for step in run.steps(data.total_steps):
            batches = run.next(data.step, step)
            run.log(step, train_step(model, optimizer, batches, loss, run.mesh, step))
            if held_out:
                run.validate(step, lambda: validation_means(model, optimizer, held_out, loss, run.mesh))
            run.save_if_due(step)
        run.finish()


def pair_loss(centring: float, shards: SequenceShards | None) -> LossFunction:
    """The loss of pairs, of which a row holds the chosen and the rejected answer in turn, with a label where each ends."""

    def loss(head: ScoreHead, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        is_read = batch.labels != IGNORED

        def of_answers(values: Tensor) -> tuple[Tensor, Tensor]:
            """(B, T) at the tokens that are read -> two of (B, pairs), 0 where a row has fewer."""
            assert batch.documents is not None
            sums = document_sums(values * is_read, batch.documents, batch.most_documents, shards)
            return sums[:, ::2], sums[:, 1::2]

        chosen, rejected = of_answers(head.scores(hidden, batch.labels)[..., 0])
        is_pair, (margin, _) = of_answers(torch.ones_like(batch.extra["values"]))[0], of_answers(batch.extra["values"])

        def total(values: Tensor) -> Tensor:
            """Over pairs. Ranks that share rows have the same: each gives its share."""
            return (values * is_pair).sum() / (shards.ranks if shards else 1)

        return {
            "loss": (total(bradley_terry(chosen, rejected, margin, centring)), "pairs"),
            "accuracy": Metric(total(chosen > rejected), "pairs"),
            "margin": Metric(total(chosen - rejected), "pairs"),
            "reward_chosen": Metric(total(chosen), "pairs"),
            "reward_rejected": Metric(total(rejected), "pairs"),
        }

    return loss


def class_loss(head: ScoreHead, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, str]]:
    """The loss of texts, or of the steps of an answer: each has its class for a label, where it ends."""
    is_read = batch.labels != IGNORED
    scores, labels = head.scores(hidden, batch.labels)[is_read], batch.labels[is_read]
    return {
        "loss": (class_cross_entropy(scores, labels).sum(), "tokens"),
        "accuracy": Metric((scores.argmax(-1) == labels).sum(), "tokens"),
    }
