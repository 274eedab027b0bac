"""One sequence in the making, and whoever guesses what comes next in it.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.constraints import Matcher
from tunesmith.generation.reader import Memory
from tunesmith.generation.sampling import RandomNumbers, Sampling
from tunesmith.generation.text import TextStream, continuation_text


@dataclass(eq=False)
class Writing:
    """One sequence: a prompt, and what is written after it."""

    prompt: list[int]
    sampling: Sampling
    index: int = 0
    """What it is called by whoever asked for it."""
    numbers: RandomNumbers | None = None
    """Its own, one a token; None where none are drawn."""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None
    text: TextStream | None = None
    """Only where text is needed while tokens come."""
    finish_reason: Literal["stop", "length"] | None = None
    has_stop_token: bool = False
    room: int = 0
    """Tokens it may have."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it."""
    seen: Tensor | None = None
    """(V,) what its penalties count."""
    matcher: Matcher | None = None
    """Where the text has a given form: how far it has come in it."""
    score_from: int | None = None
    """Set where nothing is to be written: the prompt's log-probabilities are asked for from this token on."""
    scores: list[tuple[float, bool]] = field(default_factory=list)
    """Of each of those tokens, and whether it is the likeliest."""
    memory: Memory = field(init=False)

    def __post_init__(self):
        if self.score_from is None:
            self.memory = Memory(list(self.prompt))
        else:  # the last token is only asked about
            self.memory = Memory(self.prompt[:-1], wanted_from=self.score_from - 1)

    @property
    def spoken(self) -> list[int]:
        """Without the stop token."""
        return self.ids[:-1] if self.has_stop_token else self.ids

    def whole_text(self, tokenizer: Tokenizer) -> str:
        return self.text.text if self.text is not None else continuation_text(tokenizer, self.prompt, self.spoken)


class Drafter(Protocol):
    """Guesses what comes next, for the model to check: right guesses cost no pass of their own, wrong ones change nothing."""

    def guess(self, writings: Sequence[Writing], limits: Sequence[int]) -> list[list[int]]:
        """For each sequence up to its limit of tokens."""
        ...

    def leave(self, writing: Writing) -> None:
        """The sequence is not asked about any more, or from the start."""
        ...


def random_numbers(sampling: Sampling, seed: int, prompt: int, sample: int) -> RandomNumbers | None:
    """What a sequence draws with: the same whatever else is generated."""
    return None if sampling.temperature == 0 else RandomNumbers(seed, prompt, sample)
