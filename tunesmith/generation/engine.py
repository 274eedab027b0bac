"""Generation: prompts in batches through the model and its cache, token by token.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.sampling import Sampling, choose, uniforms
from tunesmith.generation.text import TextStream, continuation_text
from tunesmith.models.decoder import CausalLM
from tunesmith.models.families import check_speaks
from tunesmith.models.family import DecoderConfig
from tunesmith.models.score import ScoreModel
from tunesmith.nn.kv_cache import KVCache
from tunesmith.nn.part import let_go

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]
"""Text, token ids, or the messages of a conversation."""


@dataclass
class Completion:
    """One continuation of one prompt."""

    text: str
    """Without special tokens, cut before a stop string."""
    ids: list[int]
    """All generated tokens, the stop token included."""
    finish_reason: Literal["stop", "length"]
    """stop: a stop token or stop string came; length: max_new_tokens or the end of the context."""
    log_probs: list[float] | None
    """Of each of `ids` under the model itself, where they were asked for."""
    prompt_ids: list[int]
    """The prompt's tokens."""


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt] | str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    *,
    batch_size: int = 8,
    chat: bool | None = False,
    on_text: Callable[[int, str], None] | None = None,
    **sampling: Any,
) -> list[str]:
    """The continuations of `prompts` as text, one string a prompt (num_samples strings a prompt, those of one prompt together).

    Args:
        prompts: texts, lists of token ids, or conversations (lists of messages), which are answered.
        temperature: 0 always takes the likeliest token.
        batch_size: sequences generated at a time.
        chat: put texts through the chat template as a user's message; None: where the tokenizer has one.
        on_text: called with (index of the string in the result, piece of text) as text comes.
        sampling: further fields of tunesmith.generation.sampling.Sampling: top_k, top_p, min_p, repetition_penalty, stop, seed, …
    """
    options = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, **sampling)
    several: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
    return [
        completion.text
        for completion in generate_completions(model, tokenizer, several, options, batch_size, chat, on_text)
    ]


def generate_completions(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int = 8,
    chat: bool | None = None,
    on_text: Callable[[int, str], None] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[Completion]:
    """Like `generate`, with tokens, reasons and log-probabilities: sampling.num_samples completions a prompt, in the prompts' order.

    agree: given the tokens (B,) chosen here, those that all ranks take which generate the same together: what is rounded
    another way somewhere must not lead them apart.

    A sequence's text does not depend on what else is generated (but for rounding: cached rows of a batch agree with single ones to about 1e-6).
    Raises UserError for a prompt that is empty or longer than the model's context, and for a model whose head gives scores.
    """
    if isinstance(model, ScoreModel):
        check_speaks(model.family, model.hf_config, "this model")
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    for index, ids in enumerate(encoded):
        _check_prompt(index, ids, model.config)
    sequences = [
        _Sequence(
            index * sampling.num_samples + sample,
            ids,
            _room(ids, sampling, model.config),
            uniforms(seed, index, sample, sampling.max_new_tokens),
        )
        for index, ids in enumerate(encoded)
        for sample in range(sampling.num_samples)
    ]
    by_length = sorted(sequences, key=lambda sequence: -len(sequence.prompt) if batch_size > 1 else 0)  # little padding
    engine = _Engine(model, tokenizer, sampling, on_text, agree)
    was_training = model.training
    model.eval()
    # What `fully_shard` gathers into must not become inference tensors: training could not use them again.
    is_sharded = any(hasattr(module, "unshard") for module in model.modules())
    try:
        with torch.no_grad() if is_sharded else torch.inference_mode():
            for batch in _groups(by_length, batch_size):
                engine.run(batch)
    finally:
        let_go(model)
        model.train(was_training)
    return [sequence.completion(tokenizer) for sequence in sequences]


@dataclass
class _Sequence:
    """One continuation in the making."""

    index: int
    """Of the completion in the result."""
    prompt: list[int]
    room: int
    """Tokens it may have."""
    uniforms: Tensor
    """(max_new_tokens,) its own random numbers."""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None
    text: TextStream | None = None
    """Only where text is needed while tokens come."""
    finish_reason: Literal["stop", "length"] | None = None
    has_stop_token: bool = False

    def completion(self, tokenizer: Tokenizer) -> Completion:
        assert self.finish_reason is not None
        spoken = self.ids[:-1] if self.has_stop_token else self.ids
        text = self.text.text if self.text is not None else continuation_text(tokenizer, self.prompt, spoken)
        return Completion(text, self.ids, self.finish_reason, self.log_probs, self.prompt)


class _Engine:
    """Runs groups of sequences from prompt to end; a finished one leaves its group."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        on_text: Callable[[int, str], None] | None,
        agree: Callable[[Tensor], Tensor] | None,
    ):
        self.model, self.tokenizer, self.sampling, self.on_text = model, tokenizer, sampling, on_text
        self.agree = agree or (lambda tokens: tokens)
        self.device, self.dtype = model.model.device, model.model.compute_dtype
        self.stop_ids = frozenset(tokenizer.stop_ids if sampling.stop_ids is None else sampling.stop_ids)

    def run(self, sequences: list[_Sequence]) -> None:
        for sequence in sequences:
            sequence.log_probs = [] if self.sampling.log_probs else None
            if self.on_text is not None or self.sampling.stop:
                sequence.text = TextStream(self.tokenizer, sequence.prompt, self.sampling.stop)
        logits, cache = self._read_prompts(sequences)
        seen = self._seen(sequences)
        numbers = self._numbers(sequences)
        for step in itertools.count():
            tokens = self._choose(sequences, logits, numbers[:, step] if numbers is not None else None, seen)
            going = [
                row
                for row, (sequence, token) in enumerate(zip(sequences, tokens.tolist()))
                if self._add(sequence, token)
            ]
            if not going:
                return
            if len(going) < len(sequences):
                rows = torch.tensor(going, device=self.device)
                sequences, tokens = [sequences[row] for row in going], tokens[rows]
                numbers, seen = (None if part is None else part[rows] for part in (numbers, seen))
                cache.select(rows)
            if seen is not None:
                seen[torch.arange(len(tokens), device=self.device), tokens] = True
            logits = self._logits(self.model(tokens[:, None], cache=cache)[:, -1])

    def _read_prompts(self, sequences: list[_Sequence]) -> tuple[Tensor, KVCache]:
        """Logits (B, V) after each prompt, and the cache; samples of one prompt read it once."""
        prompts = list({id(sequence.prompt): sequence.prompt for sequence in sequences}.values())
        cache = KVCache(
            self.model.config, len(prompts), max(len(s.prompt) + s.room for s in sequences), self.dtype, self.device
        )
        last = torch.cat([self._read(prompts[rows], cache.part(rows)) for rows in _similar(prompts)])
        cache.length = torch.tensor([len(prompt) for prompt in prompts])
        rows_of = {id(prompt): row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([rows_of[id(sequence.prompt)] for sequence in sequences], device=self.device)
        if len(prompts) < len(sequences):
            cache.select(rows)
        return self._logits(last)[rows], cache

    def _read(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Fill an empty cache. Hidden states (B, D) of the prompts' last tokens."""
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        is_ragged = any(len(prompt) < longest for prompt in prompts)
        hidden = self.model(
            ids, positions=positions.where(positions < lengths[:, None], -1) if is_ragged else None, cache=cache
        )
        return hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head.logits(hidden).float()

    def _seen(self, sequences: list[_Sequence]) -> Tensor | None:
        """(B, V) tokens of the prompts, where they are penalized."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(sequences), self.model.config.vocab_size, dtype=torch.bool)
        for row, sequence in zip(seen, sequences):
            row[sequence.prompt] = True
        return seen.to(self.device)

    def _numbers(self, sequences: list[_Sequence]) -> Tensor | None:
        """(B, max_new_tokens) each sequence's random numbers, where it draws."""
        if self.sampling.temperature == 0:
            return None
        numbers = torch.stack([sequence.uniforms for sequence in sequences])
        return (numbers.float() if self.device.type == "mps" else numbers).to(self.device)

    def _choose(
        self, sequences: list[_Sequence], logits: Tensor, numbers: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        tokens = self.agree(choose(logits, self.sampling, numbers, seen))
        if self.sampling.log_probs:
            values = (logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)).tolist()
            for sequence, value in zip(sequences, values):
                assert sequence.log_probs is not None
                sequence.log_probs.append(value)
        return tokens

    def _add(self, sequence: _Sequence, token: int) -> bool:
        """Take a token; whether the sequence goes on."""
        sequence.ids.append(token)
        if token in self.stop_ids:
            sequence.finish_reason, sequence.has_stop_token = "stop", True
        elif sequence.text is not None:
            self._tell(sequence, sequence.text.add(token))
            if sequence.text.is_stopped:
                sequence.finish_reason = "stop"
        if sequence.finish_reason is None and len(sequence.ids) == sequence.room:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None and sequence.text is not None:
            self._tell(sequence, sequence.text.finish())
        return sequence.finish_reason is None

    def _tell(self, sequence: _Sequence, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(sequence.index, piece)


def _encode(tokenizer: Tokenizer, prompt: Prompt, chat: bool | None) -> list[int]:
    if isinstance(prompt, str):
        if chat or (chat is None and tokenizer.chat_template is not None):
            return tokenizer.encode_prompt([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(prompt)
        return ids or ([tokenizer.bos_id] if tokenizer.bos_id is not None else [])
    if isinstance(prompt, dict):
        raise UserError(
            "a prompt is a text, a list of token ids or a list of messages, got one message: put it in a list"
        )
    if prompt and isinstance(prompt[0], dict):
        return tokenizer.encode_prompt(list(prompt))  # type: ignore[arg-type]
    return [int(number) for number in prompt]  # type: ignore[arg-type]


def _check_prompt(index: int, ids: list[int], config: DecoderConfig) -> None:
    context = config.context_length
    if not ids:
        raise UserError(
            f"prompt {index} has no tokens, and the tokenizer has no start token to begin with: write something"
        )
    if len(ids) >= context:
        raise UserError(
            f"prompt {index} has {len(ids)} tokens, but the model's context holds {context} with the answer: shorten it"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(
            f"prompt {index} holds a token id outside the model's {config.vocab_size}: is this the model's tokenizer?"
        )


def _room(ids: list[int], sampling: Sampling, config: DecoderConfig) -> int:
    return min(sampling.max_new_tokens, config.context_length - len(ids))


def _similar(prompts: list[list[int]]) -> Iterator[slice]:
    """Neighbours to be read together, so that not much of it is padding: none is shorter than 3/4 of its group's first."""
    start = 0
    for end in range(1, len(prompts) + 1):
        if end == len(prompts) or len(prompts[end]) < 0.75 * len(prompts[start]):
            yield slice(start, end)
            start = end


def _groups(sequences: list[_Sequence], size: int) -> Iterator[list[_Sequence]]:
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size]
