"""Options of `tune run evaluate`."""

from dataclasses import field
from pathlib import Path
from typing import Any

from tunesmith.configs._rules import below
from tunesmith.configs._section import section
from tunesmith.configs.shared import RunSettings, TokenizerConfig


def is_task_path(name: str) -> bool:
    """Whether a task is named by its file or folder."""
    return "/" in name or name.endswith((".yaml", ".yml")) or Path(name).expanduser().is_dir()


@section(kw_only=True)
class Evaluate(RunSettings):
    """Evaluation: scores on tasks of lm-evaluation-harness, perplexity of texts, models side by side."""

    model: str
    """Folder or Hub id of a model, or of a PEFT adapter (which brings its base)."""
    adapter: str | None = None
    """Folder or Hub id of a PEFT adapter to put on the model."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and how a conversation becomes text."""
    quantize_base: bool = False
    """Hold the matrices in 4-bit NormalFloat."""
    tensor_parallel_dim: int = 1
    """Processes that hold a model together; several such groups share the questions."""
    compare: str | list[str] = field(default_factory=list)
    """Further models or checkpoints that answer the same: the table shows how each differs from `model`, and whether by chance."""
    tasks: list[str] = field(default_factory=list)
    """Names of lm-evaluation-harness (tasks, groups, tags), or your own task files (./my_task.yaml) and folders of them."""
    include_path: str | None = None
    """Folder of task files whose names `tasks` may use as well."""
    perplexity: str | list[str] = field(default_factory=list)
    """Text files of which the perplexity is told; of a .jsonl file each row's `text`."""
    stride: int | None = None
    """Tokens by which the windows over a long text move on; default: their length, so that they do not overlap."""
    limit: int | float | None = None
    """Examples of each task, or below 1 a share of them: to try things out."""
    num_fewshot: int | None = None
    """Solved examples before each question; default: the task's own number."""
    apply_chat_template: bool = False
    """Ask in the form of a conversation."""
    fewshot_as_multiturn: bool = True
    """Solved examples are turns of the conversation; false: all of them stand in one message."""
    system_instruction: str | None = None
    """The system message."""
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """How tasks generate, over their own settings: {max_gen_toks, until, temperature, do_sample, top_k, top_p, min_p, repetition_penalty}."""
    max_length: int | None = None
    """Tokens that the model reads at most; longer contexts lose their beginning; default: what its config.json says."""
    batch_tokens: int = 4096
    """Tokens that are scored at a time."""
    batch_size: int = 8
    """Texts that are generated at a time."""
    fewshot_seed: int = 1234
    """Chooses the solved examples, where a task draws them."""
    confirm_run_unsafe_code: bool = False
    """Let tasks such as humaneval execute what the model wrote, on this machine and as you."""
    log_samples: bool = False
    """Write every question, answer and score to samples_*.jsonl."""
    output_dir: str | None = "evaluation"
    """Folder for the harness's results_*.json, comparison.json and report.html; null writes nothing."""

    @property
    def compared(self) -> list[str]:
        """The models to compare with."""
        return [self.compare] if isinstance(self.compare, str) else list(self.compare)

    @property
    def text_files(self) -> list[str]:
        return [self.perplexity] if isinstance(self.perplexity, str) else list(self.perplexity)

    def problems(self):
        yield from super().problems()
        yield from below(1, self, "batch_tokens", "batch_size", "max_length", "stride", "tensor_parallel_dim")
        yield from below(0, self, "num_fewshot", "seed", "fewshot_seed")
        if self.limit is not None and (self.limit <= 0 or self.limit > 1 and self.limit != int(self.limit)):
            yield f"`limit` is a number of examples or a share between 0 and 1, got {self.limit}"
        if self.model in self.compared and self.adapter is None:
            yield f"`compare`: {self.model} is `model` itself; name another one"
