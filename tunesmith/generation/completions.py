"""Prompts in, completions out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.engine import Engine
from tunesmith.generation.exact import log_probs_of
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.writing import Drafter, Writing, random_numbers
from tunesmith.models.decoder import CausalLM
from tunesmith.models.families import check_speaks
from tunesmith.models.family import DecoderConfig
from tunesmith.models.score import ScoreModel
from tunesmith.nn.kv_cache import BLOCK_SIZE

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
    sampling: Sampling | Sequence[Sampling],
    batch_size: int = 8,
    chat: bool | None = None,
    on_text: Callable[[int, str], None] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
    cache_tokens: int | None = None,
    drafter: Callable[[int], Drafter] | None = None,
    exact_logprobs: bool = False,
    compile: bool = False,
    places: Sequence[int] | None = None,
) -> list[Completion]:
    """Like `generate`, with tokens, reasons and log-probabilities: sampling.num_samples completions a prompt, in the prompts' order.

    Args:
        sampling: for all prompts, or one for each.
        agree: see Engine.
        cache_tokens: tokens whose keys and values are held; None: enough for batch_size of the longest sequences.
        drafter: given cache_tokens, who guesses ahead (generation.speculative).
        compile: see Engine.
        exact_logprobs: log-probabilities to the bit as a training step computes them (generation.exact).
        places: numbers that a prompt's randomness depends on; None: its place among `prompts`. For whoever generates a part of more.

    A sequence's text does not depend on what else is generated (but for rounding: see Engine).
    Raises UserError for a prompt that is empty or longer than the model's context, and for a model whose head gives scores.
    """
    encoded = encode_prompts(model, tokenizer, prompts, chat)
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    writings = list(_writings(encoded, samplings, range(len(encoded)) if places is None else places))
    if cache_tokens is None:
        cache_tokens = _memory_for(writings, batch_size, model.config)
    engine = Engine(
        model,
        tokenizer,
        batch_size,
        cache_tokens,
        shares=_begin_alike(encoded, samplings),
        on_text=on_text,
        agree=agree,
        drafter=None if drafter is None else drafter(cache_tokens),
        compile=compile,
    )
    engine.run(writings)
    if exact_logprobs:
        _score_exactly(model, tokenizer, writings)
    return [_completion(writing, tokenizer) for writing in writings]


def _score_exactly(model: CausalLM, tokenizer: Tokenizer, writings: list[Writing]) -> None:
    was_training = model.training
    model.eval()
    pad_id = getattr(tokenizer, "pad_id", None) or 0
    found = log_probs_of(model, [(one.prompt, one.ids) for one in writings], pad_id, model.config.context_length)
    for writing, values in zip(writings, found):
        writing.log_probs = values
    model.train(was_training)


def _writings(encoded: list[list[int]], samplings: list[Sampling], places: Sequence[int]) -> Iterator[Writing]:
    drawn = secrets.randbits(32)
    index = 0
    for place, ids, sampling in zip(places, encoded, samplings, strict=True):
        seed = drawn if sampling.seed is None else sampling.seed
        for sample in range(sampling.num_samples):
            yield Writing(ids, sampling, index, random_numbers(sampling, seed, place, sample))
            index += 1


def _memory_for(writings: list[Writing], batch_size: int, config: DecoderConfig) -> int:
    """Tokens that no batch of these exceeds."""
    longest = sorted(
        -(-min(len(one.prompt) + one.sampling.max_new_tokens, config.context_length) // BLOCK_SIZE) for one in writings
    )
    return BLOCK_SIZE * (sum(longest[-batch_size:]) + 1)


def _begin_alike(encoded: list[list[int]], samplings: list[Sampling]) -> bool:
    """Whether reading a beginning once would save anything."""
    starts = [tuple(ids[:BLOCK_SIZE]) for ids in encoded]
    return any(one.num_samples > 1 for one in samplings) or len(set(starts)) < len(starts)


def _completion(writing: Writing, tokenizer: Tokenizer) -> Completion:
    assert writing.finish_reason is not None
    text = writing.whole_text(tokenizer)
    return Completion(text, writing.ids, writing.finish_reason, writing.log_probs, writing.prompt)


def encode_prompts(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool | None
) -> list[list[int]]:
    """Raises UserError as generate_completions says."""
    if isinstance(model, ScoreModel):
        check_speaks(model.family, model.hf_config, "this model")
    return checked_prompts(model.config, tokenizer, prompts, chat)


def checked_prompts(
    shape: DecoderConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool | None
) -> list[list[int]]:
    """The same of a model of which only the numbers are known."""
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    for index, ids in enumerate(encoded):
        _check_prompt(index, ids, shape)
    return encoded


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
