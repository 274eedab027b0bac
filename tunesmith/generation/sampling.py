"""How the next token is to be chosen, and the random numbers it is drawn by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.generation.constraints import Constraint


@dataclass(frozen=True)
class Sampling:
    """What generation does with the model's distribution. Steps apply in this order: penalties, bias, constraint, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256
    """Longest continuation in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the likeliest tokens that hold this much probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Keep tokens at least this likely relative to the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occur in the prompt or the text less likely (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Lowers the logit of every token that was already generated (OpenAI's); below 0 raises it."""
    frequency_penalty: float = 0.0
    """Lowers a token's logit by this for each time that it was already generated (OpenAI's); below 0 raises it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens."""
    constraint: Constraint | None = None
    """The form that the text must have."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are cut off."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end the text; None takes the tokenizer's."""
    seed: int | None = None
    """A sequence's randomness depends on this, its prompt's index and its sample's index only; None draws one."""
    num_samples: int = 1
    """Continuations per prompt."""
    log_probs: bool = False
    """Return each token's log-probability under the model itself (temperature 1, nothing filtered)."""

    @property
    def is_penalized(self) -> bool:
        """Whether what comes depends on what occurred."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "top_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be a number that is not negative, got {self.temperature}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {value}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"`repetition_penalty` must be positive, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be a number, got {getattr(self, name)}")
        for token, value in self.logit_bias.items():
            if token < 0 or not math.isfinite(value):
                raise ValueError(f"`logit_bias` must give tokens' ids a number each, got {token}: {value}")
        if isinstance(self.stop, str):
            raise ValueError(f"`stop` is a list of strings, got one string: write [{self.stop!r}]")
        if not all(self.stop):
            raise ValueError("`stop` holds an empty string: it would end every text at once")


class RandomNumbers:
    """The random numbers in [0, 1) of one sequence, the same whatever else is generated; drawn as they are asked for."""

    _AT_ONCE = 64

    def __init__(self, seed: int, prompt: int, sample: int):
        digest = hashlib.sha256(f"{seed}:{prompt}:{sample}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        self._drawn: list[float] = []

    def __getitem__(self, place: int) -> float:
        while place >= len(self._drawn):
            self._drawn += torch.rand(self._AT_ONCE, generator=self._generator, dtype=torch.float64).tolist()
        return self._drawn[place]


def uniforms(seed: int, prompt: int, sample: int, count: int) -> Tensor:
    """The first (count,) of them, float64."""
    numbers = RandomNumbers(seed, prompt, sample)
    return torch.tensor([numbers[place] for place in range(count)], dtype=torch.float64)
