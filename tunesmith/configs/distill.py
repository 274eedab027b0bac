"""Options of `tune run distill`."""

from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Any, ClassVar, Literal

from tunesmith.configs._rules import Checked, below, outside
from tunesmith.configs._section import section
from tunesmith.configs.data import ChatData
from tunesmith.configs.shared import TrainSettings


@section
class Teacher(Checked):
    """The model to learn from: of any size and family, over the same vocabulary."""

    model: str
    """Folder with config.json and safetensors, or a Hub id."""
    quantize: Literal["nf4"] | None = None
    """Hold its matrices in 4-bit NormalFloat."""
    cache_top_k: int | None = None
    """Before training, write the log-probabilities of its so many likeliest tokens at every answer token to the cache, and train without it; what the other tokens have together counts as one more token. null: it computes all of them along with every step."""

    def problems(self):
        yield from below(1, self, "cache_top_k")


@section
class _Divergence(Checked):
    temperature: float = 1.0
    """Logits of both models are divided by it; the loss isn't multiplied by its square."""

    def problems(self):
        if self.temperature <= 0:
            yield f"`temperature` must be above 0, got {self.temperature}"


@section
class ForwardKL(_Divergence):
    """KL(teacher || student): cover all that the teacher may say (arXiv 1503.02531)."""

    type: ClassVar[str] = "forward_kl"


@section
class ReverseKL(_Divergence):
    """KL(student || teacher): keep to what the teacher is likely to say (arXiv 2306.08543)."""

    type: ClassVar[str] = "reverse_kl"


@section
class SymmetricKL(_Divergence):
    """sym_kd_ratio * KL(teacher || student) + (1 - sym_kd_ratio) * KL(student || teacher)."""

    type: ClassVar[str] = "symmetric_kl"
    sym_kd_ratio: float = 0.5
    """Weight of the forward divergence."""

    def problems(self):
        yield from super().problems()
        yield from outside(0, 1, self, "sym_kd_ratio")


@section
class JensenShannon(_Divergence):
    """beta * KL(teacher || m) + (1 - beta) * KL(student || m), m = beta * teacher + (1 - beta) * student (GKD, arXiv 2306.13649)."""

    type: ClassVar[str] = "jsd"
    beta: float = 0.5
    """Weight of the teacher in the mixture: towards 0 the divergence is like beta * forward_kl, towards 1 like (1 - beta) * reverse_kl."""

    def problems(self):
        yield from super().problems()
        if not 0 < self.beta < 1:
            yield f"`beta` must be above 0 and below 1, got {self.beta}; its ends are `type: forward_kl` and `type: reverse_kl`"


@section
class Sampling(Checked):
    """How the student writes answers of its own."""

    temperature: float = 1.0
    """0 always takes the likeliest token; 1 samples from the student's own distribution."""
    max_new_tokens: int = 256
    """Longest answer in tokens; tokenizer.max_seq_len limits it together with its prompt."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this much probability."""
    batch_size: int = 32
    """Answers written at a time; all ranks write them together."""

    def problems(self):
        yield from below(1, self, "max_new_tokens", "top_k", "batch_size")
        yield from below(0, self, "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"`top_p` must be above 0 and at most 1, got {self.top_p}"


Divergence = ForwardKL | ReverseKL | SymmetricKL | JensenShannon


@section(kw_only=True)
class Distill(TrainSettings):
    """Distillation: learn from a larger model's distribution over every next token."""

    model: str
    """The student: folder with config.json and safetensors, or a Hub id."""
    teacher: Teacher
    """The model to learn from."""
    divergence: Divergence = field(default_factory=ForwardKL)
    """How the difference of the two distributions is measured."""
    kd_ratio: float = 0.5
    """loss = kd_ratio * divergence + (1 - kd_ratio) * cross-entropy of the answers."""
    on_policy_ratio: float = 0.0
    """Share of the steps whose (last) answers the student writes itself, for the teacher to judge; the loss is the divergence alone then (GKD, arXiv 2306.13649)."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the student writes them."""
    dataset: ChatData | list[ChatData]
    """Conversations to train on: one source, or a list drawn by weight."""
    dataset_val: ChatData | list[ChatData] | None = None
    """Conversations for the validation loss."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers before and after training; shown in report.html."""

    def problems(self):
        yield from super().problems()
        yield from outside(0, 1, self, "kd_ratio", "on_policy_ratio")
        if getattr(self.teacher, "cache_top_k", None):
            for option, _ in self._sources(lambda source: getattr(source, "streaming", False)):
                yield (
                    f"`teacher.cache_top_k` can't be combined with `{option}.streaming: true`: what is kept is found by a token's place in "
                    "the data, which a stream doesn't know beforehand; leave one of them out"
                )
        if self.on_policy_ratio > 0:
            yield from self._on_policy()
        elif self.sampling != Sampling():
            yield "`sampling` has no effect with `on_policy_ratio: 0`: the student writes no answers then"

    def _sources(self, of: Callable[[Any], bool], *options: str) -> Iterator[tuple[str, Any]]:
        """(option, section) of each source for which `of` holds."""
        for option in options or ("dataset", "dataset_val"):
            sections = getattr(self, option)
            for number, source in enumerate(sections if isinstance(sections, list) else [sections]):
                if of(source):
                    yield (f"{option}.{number}" if isinstance(sections, list) else option), source

    def _on_policy(self) -> Iterator[str]:
        ratio = f"`on_policy_ratio: {self.on_policy_ratio}`"
        if getattr(self.teacher, "cache_top_k", None):
            yield f"{ratio} can't be combined with `teacher.cache_top_k`: the teacher judges what the student will write; set one of them to its default"
        if self.pipeline_parallel_dim > 1:
            yield (
                f"{ratio} can't be combined with `pipeline_parallel_dim: {self.pipeline_parallel_dim}`: text isn't generated through a "
                "pipeline of ranks yet; leave one of them out"
            )
        for name, why in (
            ("packed", "answers that are not there yet can't be packed"),
            ("train_on_input", "it leaves no prompt to answer"),
        ):
            for option, _ in self._sources(lambda source: getattr(source, name, False), "dataset"):  # noqa: B023
                yield f"{ratio} can't be combined with `{option}.{name}: true`: {why}; set one of them to its default"
