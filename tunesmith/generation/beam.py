"""Beam search: the likeliest texts that looking at several beginnings at once finds, as transformers defines it.

N beams of a prompt, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.generation.completions import Completion, Prompt, encode_prompts
from tunesmith.generation.reader import Memory, Reader, generating
from tunesmith.generation.text import continuation_text
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.kv_cache import BLOCK_SIZE

_CHUNK = 1024
"""Tokens of a prompt that are read at once."""


@dataclass(frozen=True)
class Beams:
    """How wide to search, and when to stop."""

    num_beams: int = 4
    """Beginnings that are followed at a time."""
    length_penalty: float = 1.0
    """A text's score is the sum of its log-probabilities divided by its length to this power: above 0 favours long ones."""
    early_stopping: bool | Literal["never"] = False
    """Stop as soon as num_beams texts are complete (true); when none that is going on would be better at its length now (false), or at any length (never)."""

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"`num_beams` must be at least 1, got {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"`early_stopping` must be true, false or never, got {self.early_stopping!r}")


def search_completions(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    beams: Beams,
    max_new_tokens: int = 256,
    *,
    num_samples: int = 1,
    stop_ids: Collection[int] | None = None,
    batch_size: int = 8,
    chat: bool | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[Completion]:
    """The best num_samples (at most num_beams) texts after each prompt, the best first.

    Args:
        stop_ids: tokens that end a text; None: the tokenizer's.
        batch_size: beams that the model reads at a time; one prompt's are always together.
        agree: given what was found here, what all ranks take that search the same together, as in Engine.

    Raises UserError like generate_completions.
    """
    ends = frozenset(tokenizer.stop_ids if stop_ids is None else stop_ids)
    context = model.config.context_length
    encoded = encode_prompts(model, tokenizer, prompts, chat)
    searches = [_Search(ids, min(max_new_tokens, context - len(ids)), ends, beams) for ids in encoded]
    together = max(1, batch_size // beams.num_beams)
    with generating(model):
        for start in range(0, len(searches), together):
            _Searching(model, searches[start : start + together], agree or (lambda found: found)).run()
    best = [(search, ids) for search in searches for _, ids in search.finished[:num_samples]]
    return [_completion(tokenizer, search.prompt, ids, ends) for search, ids in best]


def _completion(tokenizer: Tokenizer, prompt: list[int], ids: list[int], ends: frozenset[int]) -> Completion:
    is_stopped = ids[-1] in ends
    text = continuation_text(tokenizer, prompt, ids[:-1] if is_stopped else ids)
    return Completion(text, ids, "stop" if is_stopped else "length", None, prompt)


@dataclass
class _Search:
    """One prompt's beams: what is followed, and what is complete."""

    prompt: list[int]
    room: int
    """Tokens a text may have."""
    ends: frozenset[int]
    beams: Beams
    going: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    """(sum of log-probabilities, tokens) from high to low."""
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    """(score, tokens) from high to low."""
    is_over: bool = False

    def take(self, log_probs: Tensor, agree: Callable[[Tensor], Tensor]) -> list[int]:
        """Go on by one token, given the log-probabilities (N, V) of the next; for each beam that goes on, which one it comes from."""
        width, length = self.beams.num_beams, len(self.going[0][1]) + 1
        sums = torch.tensor([one for one, _ in self.going], device=log_probs.device)[:, None] + log_probs
        # So many that enough of them go on, whatever ends.
        count = min(max(2, 1 + len(self.ends)) * width, sums.numel())
        values, places = sums.flatten().topk(count)
        places = agree(places).tolist()
        found = [(value, *divmod(place, log_probs.shape[-1])) for value, place in zip(agree(values).tolist(), places)]
        complete = [token in self.ends or length == self.room for _, _, token in found]
        self._finish([one for one, ends in zip(found[:width], complete) if ends], length)
        goes_on = [one for one, ends in zip(found, complete) if not ends][:width]
        self.going = [(value, [*self.going[parent][1], token]) for value, parent, token in goes_on]
        self.is_over = not goes_on or not self._may_improve(goes_on[0][0], length)
        return [parent for _, parent, _ in goes_on]

    def _finish(self, found: list[tuple[float, int, int]], length: int) -> None:
        """Take complete texts, of which the best stay."""
        for value, parent, token in found:
            score = value / length**self.beams.length_penalty
            self.finished.append((score, [*self.going[parent][1], token]))
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self.beams.num_beams :]

    def _may_improve(self, best: float, length: int) -> bool:
        """Whether what goes on, the best with the sum `best`, may still become one of the best texts."""
        if len(self.finished) < self.beams.num_beams:
            return True
        if self.beams.early_stopping is True:
            return False
        penalty = self.beams.length_penalty
        at = self.room if self.beams.early_stopping == "never" and penalty > 0 else length
        return best / at**penalty > self.finished[-1][0]


class _Searching:
    """Brings the beams of some searches through the model, all of them in one pass a token."""

    def __init__(self, model: CausalLM, searches: list[_Search], agree: Callable[[Tensor], Tensor]):
        self.model, self.searches, self.agree = model, searches, agree
        self.reader = Reader(model, BLOCK_SIZE * sum(self._blocks(search) for search in searches))
        self.memories = [[Memory(list(search.prompt))] for search in searches]

    def _blocks(self, search: _Search) -> int:
        """No more are ever taken: a prompt's are shared by its beams, unless each has to be read anew as it grows."""
        width, prompt = search.beams.num_beams, -(-len(search.prompt) // BLOCK_SIZE)
        own = -(-search.room // BLOCK_SIZE) + 2
        return width * (prompt + own) if self.model.config.depends_on_length else prompt + width * own

    def run(self) -> None:
        while going := [number for number, search in enumerate(self.searches) if not search.is_over]:
            memories = [memory for number in going for memory in self.memories[number]]
            log_probs = self.model.lm_head.logits(self._read(memories)).float().log_softmax(-1)
            start = 0
            for number in going:
                end = start + len(self.memories[number])
                self._follow(number, self.searches[number].take(log_probs[start:end], self.agree))
                start = end

    def _read(self, memories: list[Memory]) -> Tensor:
        """The hidden states (N, D) of all last tokens."""
        for memory in memories:
            if self.reader.outdated(memory):
                self.reader.forget(memory)
        steps = [memory for memory in memories if memory.read]
        rows = {id(memory): self._whole(memory) for memory in memories if not memory.read}
        if steps:
            for memory in steps:
                self._grow(memory, len(memory.ids))
            hidden = self.reader.read([(memory, memory.ids[-1:]) for memory in steps])
            for memory, row in zip(steps, hidden):
                memory.read += 1
                rows[id(memory)] = row
        return torch.stack([rows[id(memory)] for memory in memories])

    def _whole(self, memory: Memory) -> Tensor:
        """Read a text from its start; the hidden state (D,) of its last token."""
        self.reader.begin(memory)
        hidden = torch.empty(0)
        while memory.unread:
            count = min(memory.unread, _CHUNK)
            self._grow(memory, memory.read + count)
            hidden = self.reader.read([(memory, memory.ids[memory.read : memory.read + count])])
            memory.read += count
        return hidden[-1]

    def _grow(self, memory: Memory, length: int) -> None:
        if not self.reader.grow(memory, length):
            raise AssertionError("the cache is too small for its beams")

    def _follow(self, number: int, parents: list[int]) -> None:
        """Give each beam that goes on the memory of the one it comes from, and its own new token."""
        before = self.memories[number]
        # Copies first: the memory itself goes to the last that comes from it.
        after = [
            before[parent] if parent not in parents[place + 1 :] else self._copy(before[parent])
            for place, parent in enumerate(parents)
        ]
        for place, memory in enumerate(before):
            if place not in parents:
                self.reader.forget(memory)
        for memory, (_, ids) in zip(after, self.searches[number].going):
            memory.ids.append(ids[-1])
        self.memories[number] = after
        if self.searches[number].is_over:
            for memory in after:
                self.reader.forget(memory)

    def _copy(self, memory: Memory) -> Memory:
        """Another memory of the same tokens: full blocks are shared, one that is being filled is copied."""
        full = memory.read // BLOCK_SIZE
        other = Memory(list(memory.ids), memory.table[:full], memory.read, kind=memory.kind)
        self.reader.blocks.hold(other.table)
        if memory.read % BLOCK_SIZE:
            self._grow(other, memory.read)
            self.reader.pool.copy(memory.table[full], other.table[full])
        return other
