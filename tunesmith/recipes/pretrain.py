"""Pre-training: raise the likelihood of every next token of plain text, from scratch or from a checkpoint.

    tune run pretrain model=llama3_2/1B tokenizer.path=meta-llama/Llama-3.2-1B dataset.source=texts/     from scratch
    tune run pretrain model=Qwen/Qwen3-0.6B from_scratch=false dataset.source=texts/                     go on training

What differs from sft: plain text instead of conversations, and weights that may be drawn at random.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.configs.pretrain import Pretrain
from tunesmith.data.batch import Batch
from tunesmith.data.loader import text_batches, validation_batches
from tunesmith.data.tokenizer import find_tokenizer
from tunesmith.generation.samples import Samples
from tunesmith.nn.head import Head
from tunesmith.training.build import build_model, max_sequence_length
from tunesmith.training.optim import build_optimizer
from tunesmith.training.source import find_model
from tunesmith.training.start import start_run
from tunesmith.training.step import train_step, validation_means


def main(config: Pretrain) -> None:
    def next_token_loss(head: Head, hidden: Tensor, batch: Batch) -> dict[str, tuple[Tensor, str]]:
        """Negative log-likelihood of every next token."""
        return {"loss": (head.cross_entropy(hidden, batch.labels, config.loss.chunk_size), "tokens")}

    with start_run(config, "pretrain") as run:
        source = find_model(config.model, config.model_args, need_weights=not config.from_scratch)
        tokenizer = find_tokenizer(config.tokenizer, source.tokenizer, source.family.chat_templates)
        run.check_fit(source, tokenizer)
        length = max_sequence_length(config, source)
        data = text_batches(config, tokenizer, run.mesh, max_seq_len=length)
        held_out = validation_batches(config, tokenizer, run.mesh, max_seq_len=length)
        run.note(str(data.report))

        model = build_model(config, source, tokenizer, run.mesh, run.resume_from)
        optimizer = build_optimizer(model, config, data.total_steps, run.mesh)
        run.keep(model, tokenizer, optimizer, data, source)
        samples = Samples(run.folder, model, tokenizer, config.sample_prompts, writes=run.mesh.is_main)
        if not run.resume_from:
            samples.write(0)

        for step in run.steps(data.total_steps):
            batches = run.next(data.step, step)
            run.log(step, train_step(model, optimizer, batches, next_token_loss, run.mesh, step))
            if held_out:
                run.validate(step, lambda: validation_means(model, optimizer, held_out, next_token_loss, run.mesh))
            run.save_if_due(step)

        if not run.stopped:
            samples.write(data.total_steps)
        run.finish()
