"""Options of `tune run generate`."""

from dataclasses import field
from typing import Any, Literal

from tunesmith.configs._rules import Checked, below
from tunesmith.configs._section import section
from tunesmith.configs.shared import RunSettings, TokenizerConfig


@section
class Prompt:
    """A chat prompt."""

    user: str
    """What the user says."""
    system: str | None = None
    """The system message."""


@section
class Speculative(Checked):
    """Tokens guessed ahead and checked by the model in one pass (arXiv 2211.17192)."""

    prompt_lookup: bool = False
    """Guess that the text goes on as it did where its last tokens stood before."""
    draft_model: str | None = None
    """Folder or Hub id of a smaller model with the same vocabulary that guesses."""
    num_tokens: int | None = None
    """Guessed at a time; default: 8 by look-up, 4 by a model."""

    def problems(self):
        yield from below(1, self, "num_tokens")
        if self.prompt_lookup and self.draft_model is not None:
            yield "`prompt_lookup` and `draft_model` can't be combined: leave one of them out"
        if self.num_tokens is not None and not self.prompt_lookup and self.draft_model is None:
            yield "`num_tokens` needs `prompt_lookup` or a `draft_model`, which guesses"


@section(kw_only=True)
class Generate(RunSettings):
    """Generation: continue prompts or answer them."""

    model: str
    """Folder or Hub id of a model, or of a PEFT adapter (which brings its base)."""
    adapter: str | None = None
    """Folder or Hub id of a PEFT adapter to put on the model."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer and how a conversation becomes text."""
    prompt: str | list[str] | Prompt | None = None
    """One prompt or a list; {user, system} is a chat prompt; default: read from standard input."""
    chat: bool | None = None
    """Put prompts through the chat template; default: yes where the model has one."""
    max_new_tokens: int = 256
    """Longest continuation in tokens."""
    temperature: float = 0.6
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this much probability."""
    min_p: float | None = None
    """Sample from tokens at least this likely relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Lowers the logit of every token that was already generated; below 0 raises it."""
    frequency_penalty: float = 0.0
    """Lowers a token's logit by this for each time that it was already generated; below 0 raises it."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text."""
    json_schema: str | dict[str, Any] | None = None
    """Let the text be JSON that this schema allows: a file, or the schema itself."""
    regex: str | None = None
    """Let this regular expression match the whole text."""
    grammar: str | None = None
    """Let the text be of this grammar: a file, or the grammar itself, in Lark's syntax or as GBNF."""
    num_samples: int = 1
    """Continuations per prompt."""
    num_beams: int = 1
    """Beginnings that are followed at a time in search of the likeliest text; 1: no search."""
    length_penalty: float = 1.0
    """With beams, a text's score is the sum of its log-probabilities divided by its length to this power: above 0 favours long texts."""
    early_stopping: bool | Literal["never"] = False
    """Stop a search as soon as num_beams texts are complete (true); when no beam would be better at its length now (false), or at any length (never)."""
    batch_size: int = 8
    """Texts generated at a time; as one ends, the next joins."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held for them; default: enough for the longest. With fewer, some wait, or start again."""
    compile: bool = False
    """Compile the steps; on CUDA they become graphs. It takes a while before the first text, and is worth it for many."""
    speculative: Speculative = field(default_factory=Speculative)
    """Guess ahead: the same text in fewer passes."""
    exact_logprobs: bool = False
    """Write tokens' log-probabilities into `output_file` to the bit as a training step computes them, by one more pass over each text; rotary positions that depend on the length are those of the text's own, where a run takes `tokenizer.max_seq_len`."""
    log_probs: bool = False
    """Write tokens' log-probabilities into `output_file`."""
    stream: bool | None = None
    """Show tokens as they come; default: for a single prompt in a terminal."""
    quantize_base: bool = False
    """Hold the matrices in 4-bit NormalFloat."""
    tensor_parallel_dim: int = 1
    """Processes that hold a model together; several such groups share the prompts."""
    output_file: str | None = None
    """Write {prompt, text} rows here as jsonl."""

    def problems(self):
        yield from super().problems()
        if self.compile and self.tensor_parallel_dim > 1:
            yield "`compile` can't be combined with `tensor_parallel_dim`: leave one of them out"
        yield from below(
            1,
            self,
            "max_new_tokens",
            "top_k",
            "num_samples",
            "num_beams",
            "batch_size",
            "cache_tokens",
            "tensor_parallel_dim",
        )
        if (self.log_probs or self.exact_logprobs) and self.output_file is None:
            yield "`log_probs` are written into `output_file`: name one"
        yield from below(0, self, "temperature", "seed")
        if not all(self.stop):
            yield "`stop` holds an empty string, which would end every text at once: leave it out"
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                yield f"`{name}` must be above 0 and at most 1, got {value}"
        if self.repetition_penalty <= 0:
            yield f"`repetition_penalty` must be above 0, got {self.repetition_penalty}"
        if self.num_beams > 1:
            yield from self._of_a_search()
        forms = [f"`{name}`" for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(forms) > 1:
            yield f"{' and '.join(forms)} can't be combined: leave {'one' if len(forms) == 2 else 'two'} of them out"

    def _of_a_search(self):
        if self.temperature > 0:
            yield f"`num_beams: {self.num_beams}` searches for the likeliest text and draws nothing: set `temperature: 0`"
        if self.num_samples > self.num_beams:
            yield f"a search with `num_beams: {self.num_beams}` finds so many texts, not `num_samples: {self.num_samples}`"
        others = {
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": [],
            "json_schema": None,
            "compile": False,
        }
        others |= {"regex": None, "grammar": None, "speculative": Speculative(), "log_probs": False}
        others |= {"exact_logprobs": False, "cache_tokens": None, "stream": None}
        for name, without in others.items():
            if getattr(self, name) not in (without, False):
                yield f"`num_beams` can't be combined with `{name}`: leave one of them out"
