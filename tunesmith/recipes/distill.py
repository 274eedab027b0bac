"""Distillation: a student learns from its teacher's distribution over every next token of the answers, beside the answers themselves.

tune run distill model=Qwen/Qwen3-0.6B teacher.model=Qwen/Qwen3-8B dataset.source=alpaca.jsonl                      all weights
tune run distill +lora model=Qwen/Qwen3-0.6B teacher.model=Qwen/Qwen3-32B teacher.quantize=nf4 dataset.source=…      a 4-bit teacher
tune run distill model=… teacher.model=… teacher.cache_top_k=64 dataset.source=…                     the teacher speaks once, before training
tune run distill model=… teacher.model=… divergence.type=jsd on_policy_ratio=0.5 dataset.source=…      answers of its own, judged (GKD)

What differs from sft: loss = kd_ratio * kd_loss + (1 - kd_ratio) * ce_loss, of which both are logged.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tunesmith.configs.distill import Distill
from tunesmith.data.batch import Batch
from tunesmith.data.loader import chat_batches, validation_batches
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.generation.own_answers import OWN, OwnAnswers
from tunesmith.generation.samples import Samples
from tunesmith.generation.sampling import Sampling
from tunesmith.losses.distillation import Distillation
from tunesmith.nn.head import Head, with_label
from tunesmith.parallel.mesh import Mesh
from tunesmith.training.build import build_model, max_sequence_length
from tunesmith.training.optim import build_optimizer
from tunesmith.training.source import find_model
from tunesmith.training.start import start_run
from tunesmith.training.step import Metric, train_step, validation_means
from tunesmith.training.teacher import build_divergence, check_teacher, open_teachers, shared_tokens


def main(config: Distill) -> None:
    def guided_loss(head: Head, hidden: Tensor, batch: Batch) -> Mapping[str, tuple[Tensor, str]]:
        """Divergence from the teacher and negative log-likelihood of the answer tokens, from the same logits; of own answers the first alone."""
        is_own = OWN in batch.counts
        with teacher.guide(batch) as guide:
            mixed = Distillation(
                guide,
                with_label(batch.labels, batch.labels),
                divergence,
                shared,
                1.0 if is_own else config.kd_ratio,
                config.divergence.temperature,
            )
            loss, kd_loss, ce_loss = head.sums(hidden, batch.labels, mixed, config.loss.chunk_size)
        terms = {"loss": (loss, "tokens"), "kd_loss": Metric(kd_loss, "tokens")}
        return terms if is_own else terms | {"ce_loss": Metric(ce_loss, "tokens")}

    with start_run(config, "distill") as run:
        source, teacher_source = find_model(config.model), find_model(config.teacher.model)
        tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
        check_teacher(config, source, tokenizer, teacher_source)
        computes_along, shared = config.teacher.cache_top_k is None, shared_tokens(source, teacher_source, tokenizer)
        run.check_fit(source, tokenizer, beside=teacher_source if computes_along else None)
        length = max_sequence_length(config, source)
        data = chat_batches(config, tokenizer, run.mesh, max_seq_len=length, with_index=not computes_along)
        held_out = validation_batches(config, tokenizer, run.mesh, max_seq_len=length, with_index=not computes_along)
        run.note(str(data.report))

        teacher, examiner = open_teachers(config, teacher_source, tokenizer, run.mesh, data, held_out, shared, run.note)
        model = build_model(config, source, tokenizer, run.mesh, run.resume_from)
        optimizer = build_optimizer(model, config, data.total_steps, run.mesh)
        divergence = build_divergence(config.divergence)
        answers = own_answers(config, tokenizer, run.mesh, length)
        fixed = {"teacher": teacher_source.fingerprint, "divergence": config.divergence.type}
        run.keep(model, tokenizer, optimizer, data, source, **fixed)
        samples = Samples(run.folder, model, tokenizer, config.sample_prompts, chat=True, writes=run.mesh.is_main)
        if not run.resume_from:
            samples.write(0)

        for step in run.steps(data.total_steps):
            batches = answers.of(model, run.next(data.step, step), step)
            run.log(step, train_step(model, optimizer, batches, guided_loss, run.mesh, step, teacher.prepare))
            if held_out:
                run.validate(
                    step,
                    lambda: validation_means(model, optimizer, held_out, guided_loss, run.mesh, examiner.prepare),
                )
            run.save_if_due(step)

        if not run.stopped:
            samples.write(data.total_steps)
        run.finish()


def own_answers(config: Distill, tokenizer: Tokenizer, mesh: Mesh, length: int) -> OwnAnswers:
    options = {key: value for key, value in vars(config.sampling).items() if key != "batch_size"}
    sampling, size = Sampling(**options), config.sampling.batch_size
    return OwnAnswers(tokenizer, mesh, config.on_policy_ratio, sampling, size, length, config.seed or 0)
