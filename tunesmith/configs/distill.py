"""Options of `tune run distill`."""

from dataclasses import field
from typing import ClassVar, Literal

from tunesmith.configs._section import section
from tunesmith.configs.data import ChatData
from tunesmith.configs.shared import Checked, TrainSettings, below, outside


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
    """Between forward_kl (towards 0, as which it then counts per beta) and reverse_kl (towards 1)."""

    def problems(self):
        yield from super().problems()
        if not 0 < self.beta < 1:
            yield f"`beta` must be above 0 and below 1, got {self.beta}; its ends are `type: forward_kl` and `type: reverse_kl`"


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
    dataset: ChatData | list[ChatData]
    """Conversations to train on: one source, or a list drawn by weight."""
    dataset_val: ChatData | list[ChatData] | None = None
    """Conversations for the validation loss."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers before and after training; shown in report.html."""

    def problems(self):
        yield from super().problems()
        yield from outside(0, 1, self, "kd_ratio")
        for option in ("dataset", "dataset_val"):
            sections = getattr(self, option)
            sections = sections if isinstance(sections, list) else [sections] if sections else []
            if getattr(self.teacher, "cache_top_k", None) and any(getattr(one, "streaming", False) for one in sections):
                yield (
                    f"`teacher.cache_top_k` can't be combined with `{option}.streaming: true`: what is kept is found by a token's place in "
                    "the data, which a stream doesn't know beforehand; leave one of them out"
                )
