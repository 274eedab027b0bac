"""Supervised fine-tuning: raise the likelihood of the answers.

tune run sft model=Qwen/Qwen3-0.6B dataset.source=alpaca.jsonl             all weights
tune run sft +lora model=Qwen/Qwen3-8B dataset.source=alpaca.jsonl         small adapters beside frozen weights
tune run sft +qlora model=Qwen/Qwen3-8B dataset.source=alpaca.jsonl        the same over 4-bit weights
tune run sft +qat model=Qwen/Qwen3-0.6B dataset.source=alpaca.jsonl        for a model that will be quantized (also with +lora)
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.configs.sft import SFT
from tunesmith.data.batch import Batch
from tunesmith.data.loader import chat_batches, validation_batches
from tunesmith.data.tokenizer import find_tokenizer
from tunesmith.generation.samples import Samples
from tunesmith.nn.head import Head
from tunesmith.training.build import build_model, max_sequence_length
from tunesmith.training.optim import build_optimizer
from tunesmith.training.source import find_model
from tunesmith.training.start import start_run
from tunesmith.training.step import train_step, validation_means


def main(config: SFT) -> None:
    def answer_loss(head: Head, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        """Negative log-likelihood of the answer tokens."""
        return {"loss": (head.cross_entropy(hidden, batch.labels, config.loss.chunk_size), "tokens")}

    with start_run(config, "sft") as run:
        source = find_model(config.model)
        tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
        run.check_fit(source, tokenizer)
        length = max_sequence_length(config, source)
        data = chat_batches(config, tokenizer, run.mesh, max_seq_len=length)
        held_out = validation_batches(config, tokenizer, run.mesh, max_seq_len=length)
        run.note(str(data.report))

        model = build_model(config, source, tokenizer, run.mesh, run.resume_from)
        optimizer = build_optimizer(model, config, data.total_steps, run.mesh)
        run.keep(model, tokenizer, optimizer, data, source)
        samples = Samples(run.folder, model, tokenizer, config.sample_prompts, chat=True, writes=run.mesh.is_main)
        if not run.resume_from:
            samples.write(0)

        for step in run.steps(data.total_steps):
            batches = run.next(data.step, step)
            run.log(step, train_step(model, optimizer, batches, answer_loss, run.mesh, step))
            if held_out:
                run.validate(step, lambda: validation_means(model, optimizer, held_out, answer_loss, run.mesh))
            run.save_if_due(step)

        if not run.stopped:
            samples.write(data.total_steps)
        run.finish()
