"""What a model thinks of given continuations: their tokens' log-probabilities, and whether it would have written them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.generation.engine import Engine
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.writing import Writing
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.kv_cache import BLOCK_SIZE


@dataclass(frozen=True)
class Scored:
    """A continuation under the model."""

    log_probs: list[float]
    """Of each of its tokens, after the context and those before it."""
    is_greedy: bool
    """Whether every token is the likeliest one: greedy decoding would have written the continuation."""

    @property
    def log_prob(self) -> float:
        """Of the whole continuation."""
        return sum(self.log_probs)


def score(model: CausalLM, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int = 4096) -> list[Scored]:
    """Score (context ids, continuation ids) pairs, in their order. A context holds at least one token.

    What sequences begin with alike is computed once. batch_tokens: tokens that are computed at a time.
    """
    nothing = Sampling(max_new_tokens=1)
    times = Counter(tuple(context) for context, continuation in pairs if continuation)
    # Of a context that comes several times the first reads it alone: others then go on from its very end.
    contexts = [
        Writing([*ids, 0], nothing, -1, score_from=len(ids)) for ids, count in times.items() if count > 1 < len(ids)
    ]
    writings = [
        Writing(context + continuation, nothing, index, score_from=len(context))
        for index, (context, continuation) in enumerate(pairs)
    ]
    asked = [*contexts, *(one for one in writings if pairs[one.index][1])]
    ordered = sorted(asked, key=lambda one: one.prompt[: one.score_from])  # each context before what goes on from it
    longest = max((len(one.prompt) for one in ordered), default=0)
    engine = Engine(
        model,
        None,
        batch_size=max(1, batch_tokens // 8),
        cache_tokens=_rounded(max(4 * batch_tokens, longest)),
        chunk_size=batch_tokens,
        shares=True,
    )
    engine.run(ordered)
    return [Scored([value for value, _ in one.scores], all(is_top for _, is_top in one.scores)) for one in writings]


def _rounded(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
