"""The engine: sequences join and leave between passes of the model, each with its own sampling and its own random numbers.

B sequences that go on, R rows of logits, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.constraints import Compiled, Constraint
from tunesmith.generation.reader import Reader, generating
from tunesmith.generation.sampler import Sampler, seen_in
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.text import TextStream
from tunesmith.generation.writing import Drafter, Writing
from tunesmith.models.decoder import CausalLM

_LOGITS = 1024
"""Positions whose logits exist at a time, where given tokens are scored."""


class Engine:
    """Continuous batching over a paged cache (arXiv 2309.06180): every pass reads one token of each sequence that goes on, and prompts in chunks.

    A sequence's tokens do not depend on what else is generated (but for rounding: rows of another pass agree to about 1e-6).
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        batch_size: int = 8,
        cache_tokens: int | None = None,
        chunk_size: int = 1024,
        shares: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
        drafter: Drafter | None = None,
        compile: bool = False,
    ):
        """
        Args:
            tokenizer: needed for stop tokens and stop strings.
            batch_size: sequences that are written at a time.
            cache_tokens: tokens whose keys and values are held, prompts included; None: as many as batch_size of the model's context.
            chunk_size: tokens of prompts that a pass may read beside the sequences that go on.
            shares: what sequences begin with alike is read once.
            on_text: called with (index, piece of text) as text comes.
            agree: given the tokens chosen here, those that all ranks take which generate the same together: what is rounded
                another way somewhere must not lead them apart.
            drafter: guesses ahead.
            compile: compile the steps; on CUDA they become graphs. The first step of each size takes its time.
        """
        if cache_tokens is None:
            cache_tokens = batch_size * model.config.context_length
        self.model, self.tokenizer, self.batch_size, self.chunk_size = model, tokenizer, batch_size, chunk_size
        self.reader = Reader(model, cache_tokens, shares, batch_size if compile else None)
        self.on_text, self.agree, self.drafter = on_text, agree or (lambda tokens: tokens), drafter
        self.waiting: deque[Writing] = deque()
        self.running: list[Writing] = []
        self._finished: list[Writing] = []
        self._ends: frozenset[int] = frozenset() if tokenizer is None else tokenizer.stop_ids
        self._compiled: dict[tuple[Constraint, frozenset[int]], Compiled] = {}
        self._sampler: tuple[list[Sampling], Sampler] = ([], Sampler([], self.reader.device))

    def add(self, writing: Writing) -> None:
        """Raises UserError where the context or the cache can't hold it, or a constraint can't be used."""
        sampling, context = writing.sampling, self.model.config.context_length
        writing.room = min(sampling.max_new_tokens, context - len(writing.prompt))
        if writing.room < 1 and writing.score_from is None:
            raise UserError(
                f"{len(writing.prompt)} tokens leave no room in the model's context of {context}: shorten them"
            )
        longest = len(writing.prompt) + (writing.room if writing.score_from is None else 0)
        if self.reader.needed(longest) > self.reader.pool.num_blocks:
            held = self.reader.pool.num_blocks * self.reader.pool.block_size
            raise UserError(
                f"a sequence may come to {longest} tokens, but the cache holds {held}: raise `cache_tokens`, or lower `max_new_tokens`"
            )
        writing.stop_ids = self._ends if sampling.stop_ids is None else frozenset(sampling.stop_ids)
        if sampling.log_probs:
            writing.log_probs = []
        if self.on_text is not None or sampling.stop:
            assert self.tokenizer is not None
            writing.text = TextStream(self.tokenizer, writing.prompt, sampling.stop)
        if sampling.is_penalized:
            writing.seen = seen_in(writing.prompt, self.model.num_outputs).to(self.reader.device)
        if sampling.constraint is not None:
            writing.matcher = self._form(sampling.constraint, writing.stop_ids).start(writing.prompt)
        self.waiting.append(writing)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Writing]:
        """One pass of the model; the sequences that ended with it."""
        self._finished = []
        self._admit()
        steps = self._next_steps()
        chunks = self._next_chunks()
        if not steps and not chunks:
            return self._finished
        entries = [(one.memory, new) for one, new in steps]
        entries += [(one.memory, one.memory.ids[one.memory.read : one.memory.read + count]) for one, count in chunks]
        hidden = self.reader.read(entries)
        self._take(steps, chunks, hidden)
        return self._finished

    def run(self, writings: Iterable[Writing]) -> None:
        """Bring them all to their ends."""
        with generating(self.model):
            for writing in writings:
                self.add(writing)
            while self.is_busy:
                self.step()

    def remove(self, writing: Writing) -> None:
        """Drop a sequence, wherever it is; also from within on_text."""
        if writing in self.waiting:
            self.waiting.remove(writing)
        if writing in self.running:
            self._leave(writing)

    def _form(self, constraint: Constraint, stop_ids: frozenset[int]) -> Compiled:
        if (constraint, stop_ids) not in self._compiled:
            assert self.tokenizer is not None
            made = constraint.compile(self.tokenizer, self.model.num_outputs, stop_ids)
            self._compiled[constraint, stop_ids] = made
        return self._compiled[constraint, stop_ids]

    # --- what the next pass reads -----------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting sequences in, in their order, while there is room, and no more than a pass can begin to read.

        Those that begin like one that is being read wait for it.
        """
        passed: list[Writing] = []
        reading: dict[tuple[int, ...], list[Writing]] = {}
        for one in self.running:
            self._note(one, reading)
        left = self.chunk_size - sum(one.memory.unread for one in self.running)
        while self.waiting and len(self.running) < self.batch_size and left > 0:
            writing = self.waiting.popleft()
            if self._follows(writing, reading):
                passed.append(writing)
                continue
            self.reader.begin(writing.memory, self.reader.blocks.shares)
            # A block for each sequence that goes on is left over, or they would soon be put off again.
            spare = len(self.running) + 1
            if self.running and self._missing(writing) + spare > self.reader.blocks.available:
                self.reader.forget(writing.memory)
                passed.append(writing)
                break
            self.running.append(writing)
            self._note(writing, reading)
            left -= writing.memory.unread
        self.waiting.extendleft(reversed(passed))

    def _missing(self, writing: Writing) -> int:
        return self.reader.needed(len(writing.memory.ids)) - len(writing.memory.table)

    def _note(self, writing: Writing, reading: dict[tuple[int, ...], list[Writing]]) -> None:
        """Add a sequence to those that are being read, by the tokens that they begin with."""
        if self.reader.blocks.shares and writing.memory.unread > 1:
            reading.setdefault(self._opening(writing.memory.ids), []).append(writing)

    def _opening(self, ids: list[int]) -> tuple[int, ...]:
        return tuple(ids[: self.reader.pool.block_size])

    def _follows(self, writing: Writing, reading: dict[tuple[int, ...], list[Writing]]) -> bool:
        """Whether one that is being read is about to know more of what this one begins with than is known now."""
        mine, size = writing.memory.reusable, self.reader.pool.block_size
        known = None
        for other in reading.get(self._opening(mine), ()):
            theirs = other.memory.ids
            alike = _alike(mine, theirs)
            known = self.reader.known_of(writing.memory) if known is None else known
            coming = alike - 1 if mine == theirs else min(alike, len(mine) - 1) // size * size
            if coming > known:
                return True
        return False

    def _next_steps(self) -> list[tuple[Writing, list[int]]]:
        """Sequences that have one unread token, with it and what is guessed to follow."""
        for writing in self.running:
            if self.reader.outdated(writing.memory):
                self.reader.forget(writing.memory)
        ready = [one for one in self.running if one.memory.unread == 1 and one.memory.read and one.score_from is None]
        guesses = self._guesses(ready)
        steps: list[tuple[Writing, list[int]]] = []
        for writing, guess in zip(ready, guesses):
            if writing not in self.running:  # put off for one before it
                continue
            if guess and not self.reader.grow(writing.memory, len(writing.memory.ids) + len(guess)):
                guess = []
            if self._make_room(writing, len(writing.memory.ids)):
                steps.append((writing, [writing.memory.ids[-1], *guess]))
        return [(writing, new) for writing, new in steps if writing in self.running]

    def _guesses(self, ready: list[Writing]) -> list[list[int]]:
        """None for sequences whose choice hangs on what was chosen before."""
        if self.drafter is None or self.model.config.depends_on_length:
            return [[] for _ in ready]
        limits = [one.room - len(one.ids) - 1 if one.seen is one.matcher is None else 0 for one in ready]
        return self.drafter.guess(ready, limits)

    def _next_chunks(self) -> list[tuple[Writing, int]]:
        """Unread parts of prompts, the first ones first."""
        left = self.chunk_size
        chunks = []
        for writing in list(self.running):
            memory = writing.memory
            if writing not in self.running or (memory.unread <= 1 and memory.read and writing.score_from is None):
                continue
            count = min(memory.unread, left)
            if count and self._make_room(writing, memory.read + count):
                chunks.append((writing, count))
                left -= count
        return [(writing, count) for writing, count in chunks if writing in self.running]

    def _make_room(self, writing: Writing, length: int) -> bool:
        """Blocks for `length` tokens, if need be from sequences that came later, which start again; False if it is put off itself."""
        while not self.reader.grow(writing.memory, length):
            last = self.running[-1]
            self._leave(last)
            self.waiting.appendleft(last)
            if last is writing:
                return False
        return True

    def _leave(self, writing: Writing) -> None:
        self.running.remove(writing)
        self.reader.forget(writing.memory)
        if self.drafter is not None:
            self.drafter.leave(writing)

    # --- what comes of it ------------------------------------------------------------------------

    def _take(self, steps: list[tuple[Writing, list[int]]], chunks: list[tuple[Writing, int]], hidden: Tensor) -> None:
        """Choose tokens from a pass's hidden states (L, D)."""
        asked: list[tuple[Writing, list[int]]] = []  # sequences, and what was guessed to follow
        rows: list[int] = []
        start = 0
        for writing, new in steps:
            rows += range(start, start + len(new))
            start += len(new)
            asked.append((writing, new[1:]))
            writing.memory.read += 1
        scored: list[tuple[Writing, int]] = []  # sequences, and tokens whose log-probabilities are asked for
        before: list[int] = []
        for writing, count in chunks:
            if writing.score_from is not None:
                first, read = max(writing.score_from - 1, writing.memory.read), writing.memory.read
                places = range(first, read + count)
                scored += [(writing, writing.prompt[place + 1]) for place in places]
                before += [start + place - read for place in places]
            start += count
            writing.memory.read += count
            done = writing.memory.unread == 0
            if not writing.ids:
                self.reader.tell(writing.memory, writing.memory.read, done)
            if done and writing.score_from is not None:
                self._end(writing)
            elif done:
                rows.append(start - 1)
                asked.append((writing, []))
        self._score(scored, before, hidden)
        if not rows:
            return
        wanted = hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=hidden.device)]
        self._write(asked, self.model.lm_head.logits(wanted).float())

    def _write(self, asked: list[tuple[Writing, list[int]]], logits: Tensor) -> None:
        """logits (R, V): after each sequence, and after each of its guesses."""
        owners = [(writing, place) for writing, guess in asked for place in range(len(guess) + 1)]
        chosen = self.agree(self._choose(owners, logits))
        values = None
        if any(writing.log_probs is not None for writing, _ in asked):
            values = (logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(-1)).tolist()
        tokens = chosen.tolist()
        row = 0
        for writing, guess in asked:
            for place in range(len(guess) + 1):
                if writing not in self.running:  # removed by on_text
                    break
                token = tokens[row + place]
                if writing.log_probs is not None and values is not None:
                    writing.log_probs.append(values[row + place])
                if not self._add(writing, token):
                    break
                if place == len(guess) or guess[place] != token:
                    break
                writing.memory.read += 1  # the guess was read already
            row += len(guess) + 1

    def _choose(self, owners: list[tuple[Writing, int]], logits: Tensor) -> Tensor:
        """Tokens (R,)."""
        samplings = [writing.sampling for writing, _ in owners]
        if self._sampler[0] != samplings:
            self._sampler = samplings, Sampler(samplings, logits.device)
        sampler, numbers, seen, allowed = self._sampler[1], None, None, None
        if sampler.needs_uniforms:
            kind = torch.float32 if logits.device.type == "mps" else torch.float64
            drawn = [0.0 if one.numbers is None else one.numbers[len(one.ids) + place] for one, place in owners]
            numbers = torch.tensor(drawn, dtype=kind, device=logits.device)
        if sampler.needs_seen:
            nothing = torch.zeros(logits.shape[-1], dtype=torch.int32, device=logits.device)
            seen = torch.stack([nothing if writing.seen is None else writing.seen for writing, _ in owners])
        if any(writing.matcher is not None for writing, _ in owners):
            everything = torch.ones(logits.shape[-1], dtype=torch.bool)
            masks = [everything if one.matcher is None else one.matcher.allowed() for one, _ in owners]
            allowed = torch.stack(masks).to(logits.device)
        return sampler.choose(logits, numbers, seen, allowed)

    def _add(self, writing: Writing, token: int) -> bool:
        """Take a token; whether the sequence goes on."""
        writing.ids.append(token)
        writing.memory.ids.append(token)
        if writing.seen is not None:
            writing.seen[token] += 1
        if writing.matcher is not None:
            writing.matcher.accept(token)
        if token in writing.stop_ids:
            writing.finish_reason, writing.has_stop_token = "stop", True
        elif writing.text is not None:
            self._tell(writing, writing.text.add(token))
            if writing.text.is_stopped:
                writing.finish_reason = "stop"
        if writing.finish_reason is None and writing.matcher is not None and writing.matcher.is_finished:
            writing.finish_reason = "stop"
        if writing.finish_reason is None and len(writing.ids) == writing.room:
            writing.finish_reason = "length"
        if writing.finish_reason is None:
            return True
        if writing.text is not None:
            self._tell(writing, writing.text.finish())
        if writing in self.running:
            self._end(writing)
        return False

    def _end(self, writing: Writing) -> None:
        self._leave(writing)
        self._finished.append(writing)

    def _score(self, asked: list[tuple[Writing, int]], rows: list[int], hidden: Tensor) -> None:
        """Take the log-probabilities of the tokens `asked` about, which follow `rows` of the hidden states (L, D)."""
        for start in range(0, len(rows), _LOGITS):
            part = slice(start, start + _LOGITS)
            logits = self.model.lm_head.precise_logits(hidden[torch.tensor(rows[part], device=hidden.device)])
            wanted = torch.tensor([token for _, token in asked[part]], device=logits.device)[:, None]
            values = logits.gather(-1, wanted).squeeze(-1) - logits.logsumexp(-1)
            likeliest = logits.argmax(-1) == wanted.squeeze(-1)
            for (writing, _), value, is_top in zip(asked[part], values.tolist(), likeliest.tolist()):
                writing.scores.append((value, is_top))

    def _tell(self, writing: Writing, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(writing.index, piece)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    for place, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return place
    return min(len(one), len(other))
