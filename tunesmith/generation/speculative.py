"""Guesses of what comes next, which one pass of the model checks all at once (arXiv 2211.17192).

A guess is right if it is the very token that the model chooses there, with the random number that belongs to that place. So what is
written is the same as without guessing (but for rounding), greedy or sampled; only the number of passes changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from tunesmith.generation.reader import Memory, Reader
from tunesmith.generation.sampler import Sampler
from tunesmith.generation.writing import Writing
from tunesmith.models.decoder import CausalLM


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before: for summaries, corrections, code, extraction."""

    def __init__(self, tokens: int = 8, longest: int = 3):
        """tokens: guessed at a time. longest: tokens that must stand before as they do now, or the most of them that do."""
        self.tokens, self.longest = tokens, longest

    def guess(self, writings: Sequence[Writing], limits: Sequence[int]) -> list[list[int]]:
        return [
            self._continuation(writing.memory.ids, min(limit, self.tokens)) for writing, limit in zip(writings, limits)
        ]

    def leave(self, writing: Writing) -> None:
        pass

    def _continuation(self, ids: list[int], limit: int) -> list[int]:
        for size in range(min(self.longest, len(ids) - 1) if limit > 0 else 0, 0, -1):
            end = ids[-size:]
            for start in range(len(ids) - size - 1, -1, -1):  # the latest place says most
                if ids[start] == end[0] and ids[start : start + size] == end:
                    return ids[start + size : start + size + limit]
        return []


class DraftModel:
    """Lets a smaller model with the same vocabulary write ahead, with the random numbers that the model will choose with."""

    def __init__(self, model: CausalLM, cache_tokens: int, tokens: int = 4):
        """cache_tokens: as the engine's. tokens: guessed at a time."""
        self.reader, self.tokens = Reader(model, cache_tokens), tokens
        self._memories: dict[int, Memory] = {}

    def guess(self, writings: Sequence[Writing], limits: Sequence[int]) -> list[list[int]]:
        found: dict[int, list[int]] = {id(writing): [] for writing in writings}
        context = self.reader.model.config.context_length
        going = []
        for writing, limit in zip(writings, limits):
            wanted = min(limit, self.tokens, context - len(writing.memory.ids))
            memory = self._followed(writing)
            if wanted > 0 and self.reader.grow(memory, len(writing.memory.ids) + wanted):
                going.append((writing, wanted, memory))
        for place in range(self.tokens):
            going = [one for one in going if one[1] > place]
            if not going:
                break
            for (writing, _, memory), token in zip(going, self._next([(w, memory) for w, _, memory in going], place)):
                found[id(writing)].append(token)
                memory.ids.append(token)
        return [found[id(writing)] for writing in writings]

    def leave(self, writing: Writing) -> None:
        memory = self._memories.pop(id(writing), None)
        if memory is not None:
            self.reader.forget(memory)

    def _followed(self, writing: Writing) -> Memory:
        """Its memory of the sequence, without guesses that were wrong."""
        memory = self._memories.setdefault(id(writing), Memory([]))
        right = 0
        for mine, real in zip(memory.ids, writing.memory.ids):
            if mine != real:
                break
            right += 1
        # At least the last token is read, since what follows it is asked for.
        memory.read = min(memory.read, right, len(writing.memory.ids) - 1)
        memory.ids = list(writing.memory.ids)
        return memory

    def _next(self, going: list[tuple[Writing, Memory]], place: int) -> list[int]:
        """One token more for each."""
        entries = [(memory, memory.ids[memory.read :]) for _, memory in going]
        hidden = self.reader.read(entries)
        ends = [end - 1 for end in itertools.accumulate(len(new) for _, new in entries)]
        for _, memory in going:
            memory.read = len(memory.ids)
        wanted = hidden[torch.tensor(ends, device=hidden.device)]
        logits = self.reader.model.lm_head.logits(wanted).float()
        samplings = [replace(writing.sampling, logit_bias={}) for writing, _ in going]
        numbers = [0.0 if one.numbers is None else one.numbers[len(one.ids) + place] for one, _ in going]
        drawn = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(
            logits.device, torch.float32 if logits.device.type == "mps" else torch.float64
        )
        return Sampler(samplings, logits.device).choose(logits, drawn).tolist()
