"""How the learning rate changes over a run: the schedules."""

from typing import ClassVar, Literal

from tunesmith.configs._rules import Checked, below, outside
from tunesmith.configs._section import section


@section
class _Warmup(Checked):
    gives_way: ClassVar[dict[str, str]] = {"warmup_ratio": "num_warmup_steps"}
    """{option: the option it gives way to}: a recipe's own default steps back where the user writes the other."""
    num_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float | None = None
    """The same as a share of all steps; give one of the two."""

    def problems(self):
        yield from below(0, self, "num_warmup_steps")
        if self.warmup_ratio is not None and self.num_warmup_steps:
            yield "give `num_warmup_steps` or `warmup_ratio`, not both (null turns one off)"
        names = ("warmup_ratio", "min_lr_ratio", "decay_ratio")
        yield from outside(0, 1, self, *(name for name in names if hasattr(self, name)))


@section
class Constant(_Warmup):
    """The peak rate throughout, after the warm-up."""

    type: ClassVar[str] = "constant"


@section
class Cosine(_Warmup):
    """Half a cosine wave from the peak down."""

    type: ClassVar[str] = "cosine"
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


@section
class Linear(_Warmup):
    """A straight line from the peak down."""

    type: ClassVar[str] = "linear"
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


@section
class WarmupStableDecay(_Warmup):
    """Warm-up, a long constant stretch, and a decay at the end (WSD, arXiv 2404.06395)."""

    type: ClassVar[str] = "wsd"
    decay_ratio: float = 0.1
    """Share of all steps, at the end, over which the rate falls."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the fall; sqrt is 1 - sqrt(progress)."""
    min_lr_ratio: float = 0.0
    """The rate at the end, as a share of the peak."""


LRScheduler = Constant | Cosine | Linear | WarmupStableDecay
