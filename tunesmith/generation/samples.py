"""What the model says to a few prompts at some step of a run, kept in samples.jsonl for the report."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.sampling import Sampling
from tunesmith.models.decoder import CausalLM


@dataclass(frozen=True)
class Samples:
    """What to ask, and whom. Ranks that hold a model together all answer, and one `writes`."""

    folder: Path
    model: CausalLM
    tokenizer: Tokenizer
    prompts: list[str]
    chat: bool | None = False
    max_new_tokens: int = 64
    writes: bool = True

    def write(self, step: int) -> None:
        """Answer the prompts greedily and add {step, prompt, text} rows to samples.jsonl; rows of the same step are replaced."""
        if not self.prompts:
            return
        model = self.model
        if model.pipeline is not None:
            if model.pipeline.is_main:
                print(
                    f"step {step}: no samples, as text isn't generated through a pipeline of ranks yet", file=sys.stderr
                )
            return
        was_training = model.training
        model.eval()
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        completions = generate_completions(model, self.tokenizer, self.prompts, sampling, chat=self.chat)
        model.train(was_training)
        if not self.writes:
            return
        path = self.folder / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [row for row in rows if row["step"] != step]
        rows += [{"step": step, "prompt": prompt, "text": one.text} for prompt, one in zip(self.prompts, completions)]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        temporary.replace(path)  # a kill leaves the old rows or the new ones
