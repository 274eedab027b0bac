"""A model of ours as lm-evaluation-harness asks it: log-likelihoods, rolling ones, continuations. Imports lm_eval, which takes seconds.

Tokens are cut as the harness's own HFLM cuts them, so that scores are the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.completions import Completion, generate_completions
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.score import score
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.part import parameter_parts
from tunesmith.parallel.mesh import Replicas

T = TypeVar("T")
Ids = list[int]

_WITHOUT_EFFECT = {"use_cache", "pad_token_id", "early_stopping"}
_CALLS = 40
"""In how many parts a long evaluation is computed at most."""
_MAX_NEW_TOKENS = 256
"""Of a task that names no number, as in the harness."""


class EngineLM(TemplateLM):
    """Every replica of the model takes a share of the requests; each process is given all answers."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        name: str,
        replicas: Replicas | None = None,
        *,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        batch_size: int = 8,
        seed: int = 1234,
    ):
        """
        Args:
            name: what the model is called in results.
            max_length: tokens of context and answer; longer contexts lose their beginning. None: what config.json says.
            batch_tokens: tokens that are scored at a time.
            batch_size: texts that are generated at a time.
            seed: of tasks that sample.
        """
        super().__init__()
        self.model, self.engine_tokenizer, self.name = model, tokenizer, name
        self.replicas = replicas or Replicas()
        self.batch_tokens, self.batch_size, self.seed = batch_tokens, batch_size, seed
        self.max_length = max_length or context_length(model)
        self.num_truncated = 0
        """Requests whose context lost its beginning."""
        self._device = model.model.device

    # --- tokens --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if self.engine_tokenizer.eos_id is None:
            raise UserError(f"the tokenizer of {self.name} has no end-of-text token, which evaluation needs")
        return self.engine_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self.engine_tokenizer.bos_id is None else self.engine_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        return self._encode([string], add_special_tokens)[0]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[Ids]:
        """Where a text begins with bos already (chat templates write it), no second one is added."""
        if add_special_tokens is not None:
            return self.engine_tokenizer.encode_batch(texts, add_special_tokens)
        prefix = self.engine_tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
        results: dict[int, Ids] = {}
        for special in (True, False):
            which = [index for index, text in enumerate(texts) if text.startswith(prefix) != special]
            results.update(zip(which, self.engine_tokenizer.encode_batch([texts[i] for i in which], special)))
        return [results[index] for index in range(len(texts))]

    def _pairs(self, requests: Sequence[tuple[str, str]]) -> list[tuple[Ids, Ids]]:
        """Context and continuation as tokens: what the whole has beyond the context's tokens is the continuation."""
        moved = [_with_spaces_moved(context, continuation) for context, continuation in requests]
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        encoded = dict(zip(contexts, self._encode(contexts)))
        wholes = iter(self._encode([context + continuation for context, continuation in moved if context]))
        alone = iter(self._encode([continuation for context, continuation in moved if not context], False))
        pairs = []
        for context, _ in moved:
            if context:
                ids = encoded[context]
                pairs.append((ids, next(wholes)[len(ids) :]))
            else:
                ids = next(alone)
                has_prefix = ids[:1] == [self.prefix_token_id]
                pairs.append((ids[:1], ids[1:]) if has_prefix else ([self.prefix_token_id], ids))
        return pairs

    def _cut(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """What of a pair the model can read; the last token is only predicted."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"an answer of {len(continuation)} tokens is longer than the {self.max_length} that {self.name} can read: "
                "leave its task out"
            )
        self.num_truncated += len(context) > room
        return context[-room:], continuation

    # --- requests ------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts: list[Any] = [request.args for request in requests]
        pairs = self._pairs(texts)
        answers = self._loglikelihood_tokens([(text, *pair) for text, pair in zip(texts, pairs)])
        for text, answer in zip(texts, answers):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _loglikelihood_tokens(self, requests: list[tuple[Any, Ids, Ids]], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]

        def scored(share: list[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
            return [(one.log_prob, one.is_greedy) for one in score(self.model, share, self.batch_tokens)]

        contexts = [context for context, _ in pairs]
        costs = [len(context) + len(continuation) for context, continuation in pairs]
        return self._divided(pairs, contexts, costs, scored, least=32 * self.batch_tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [self._windows(ids) for ids in self._encode(texts)]
        answers = iter(self._loglikelihood_tokens([(None, *window) for of_text in windows for window in of_text]))
        totals = [sum(next(answers)[0] for _ in of_text) for of_text in windows]
        for text, total in zip(texts, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, ids: Ids) -> list[tuple[Ids, Ids]]:
        """Pieces of a text, the last of which reads as much of the one before as fits."""
        windows = lm_eval.utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [lm_eval.utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[Any] = [request.args for request in requests]
        known: dict[Sampling, Sampling] = {}  # the engine takes those that are one object together
        samplings = [known.setdefault(one, one) for one in (self._sampling(arguments) for _, arguments in texts)]
        contexts = self._encode([context for context, _ in texts])
        prompts = [self._fitting(ids, sampling) for ids, sampling in zip(contexts, samplings)]
        costs = [len(prompt) + sampling.max_new_tokens for prompt, sampling in zip(prompts, samplings)]
        items = list(zip(range(len(prompts)), prompts, samplings))
        least = (
            16 * self.batch_size * max(costs, default=0)
        )  # the end of a call, when few are left, must not weigh much
        answers = self._divided(items, prompts, costs, self._generated, least)
        for text, answer in zip(texts, answers):
            self.cache_hook.add_partial("generate_until", text, answer)
        return answers

    def _sampling(self, arguments: dict[str, Any]) -> Sampling:
        """A task's generation arguments."""
        try:
            known: Any = normalize_gen_kwargs(arguments, _MAX_NEW_TOKENS)
            draws = known.pop("do_sample")
            temperature = float(known.pop("temperature", 1.0 if draws else 0.0))
        except (TypeError, ValueError) as error:
            raise UserError(f"generation arguments of a task: {error}") from error
        stops = [text for text in dict.fromkeys(known.pop("until")) if text]
        special = {text: self.engine_tokenizer.token_to_id(text) for text in stops}
        special = {text: number for text, number in special.items() if number in self.engine_tokenizer.special_ids}
        ends = {self.eot_token_id, *self.engine_tokenizer.model_eos_ids, *special.values()}
        filters = {name: known.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in known}
        if known.get("num_beams", 1) == 1:
            known.pop("num_beams", None)
        if unknown := [
            name for name, value in known.items() if name not in {"max_gen_toks", *_WITHOUT_EFFECT} if value
        ]:
            raise UserError(f"generation arguments of a task: `{unknown[0]}` is not understood; leave it out")
        try:
            return Sampling(
                max_new_tokens=known["max_gen_toks"],
                temperature=temperature,
                stop=tuple(text for text in stops if text not in special),
                stop_ids=tuple(sorted(number for number in ends if number is not None)),
                seed=self.seed,
                **{name: value for name, value in filters.items() if value},
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"generation arguments of a task: {error}") from error

    def _fitting(self, context: Ids, sampling: Sampling) -> Ids:
        """The end of a context that leaves room for the answer."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for up to {sampling.max_new_tokens} new tokens, but {self.name} can read {self.max_length} in all: "
                "set `gen_kwargs.max_gen_toks` to less"
            )
        self.num_truncated += len(context) > room
        return context[-room:] or [self.prefix_token_id]

    def _generated(self, requests: list[tuple[int, Ids, Sampling]]) -> list[str]:
        """Each with its place among all requests, on which its random numbers depend: not on the replica that it came to."""
        places, prompts, samplings = zip(*requests) if requests else ((), (), ())
        completions = generate_completions(
            self.model,
            self.engine_tokenizer,
            prompts,
            samplings,
            self.batch_size,
            agree=self.replicas.agree,
            places=places,
        )
        return [self._text(one, sampling) for one, sampling in zip(completions, samplings)]

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        """As transformers decodes an answer alone (a SentencePiece model's first space goes), up to the first stop."""
        is_ended = completion.ids[-1] in (sampling.stop_ids or ())
        text = self.engine_tokenizer.decode(completion.ids[:-1] if is_ended else completion.ids)
        for stop in sampling.stop:
            text = text.partition(stop)[0]
        return text

    def _divided(
        self,
        items: list[Any],
        contexts: Sequence[Ids],
        costs: list[int],
        compute: Callable[[list[Any]], list[T]],
        least: int,
    ) -> list[T]:
        """`compute` of all items on every rank; each replica did a share.

        Items whose contexts begin alike come to one replica, and as far as can be into one call, which reads that once.
        least: cost of a call of `compute`, between which it is shown how far this has come.
        """
        order = sorted(range(len(items)), key=lambda index: contexts[index])
        shares = _parts(order, contexts, costs, -(-sum(costs) // self.replicas.count))
        own = shares[self.replicas.index] if self.replicas.index < len(shares) else []
        least = max(least, sum(costs[index] for index in own) // _CALLS)

        def computed() -> dict[int, T]:
            found: dict[int, T] = {}
            is_shown = self.replicas.is_main and sys.stderr.isatty()
            with tqdm(total=len(own), desc="requests", disable=not is_shown) as bar:
                for part in _parts(own, contexts, costs, least):
                    found.update(zip(part, compute([items[index] for index in part])))
                    bar.update(len(part))
            return found

        found = {index: result for share in self.replicas.on_all(computed) for index, result in share.items()}
        return [found[index] for index in range(len(items))]

    # --- chats and names -----------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; where the last message is a beginning of the answer, the text ends with it."""
        try:
            text = self.engine_tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        except UserError:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            return self.apply_chat_template(without_system, add_generation_prompt)
        return text if add_generation_prompt else _up_to(text, chat_history[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.engine_tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine_tokenizer.source or self.name).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Of results: the keys that the harness has for models of transformers."""
        return {
            "model_num_parameters": sum(math.prod(part.shape) for part in parameter_parts(self.model).values()),
            "model_dtype": str(self.model.model.compute_dtype),
            "model_revision": "main",
            "model_sha": "",
        }


def _parts(order: list[int], contexts: Sequence[Ids], costs: list[int], least: int) -> list[list[int]]:
    """`order` cut into parts that cost at least `least` each, but for the last; what has one context is not cut apart."""
    parts: list[list[int]] = []
    cost = least
    for place, index in enumerate(order):
        if cost >= least and (place == 0 or contexts[index] != contexts[order[place - 1]]):
            parts.append([])
            cost = 0
        parts[-1].append(index)
        cost += costs[index]
    return parts


def context_length(model: CausalLM) -> int:
    """Tokens that a model reads, as its config.json says."""
    return model.config.max_position_embeddings


def _with_spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the continuation's first token."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _up_to(text: str, content: str) -> str:
    """A rendered conversation without what the template writes after the last message."""
    begin = text.rindex(content.strip())
    whole = begin + len(content.lstrip())
    return text[:whole] if text[begin:whole] == content.lstrip() else text[: begin + len(content.strip())]
