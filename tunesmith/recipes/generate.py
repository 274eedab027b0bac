"""Generation: continue prompts or answer them.

tune run generate model=run/checkpoints/step-00000100 prompt="Why is the sky blue?"
tune run generate model=Qwen/Qwen3-0.6B prompt.user="Why is the sky blue?" prompt.system="Answer as a pirate."
tune run generate model=… chat=false 'prompt=[Once upon a time, "Roses are red,"]' output_file=texts.jsonl
tune run generate model=… json_schema=schema.json prompt="Describe a cat."
tune run generate model=… < prompt.txt
tune run generate model=Qwen/Qwen3-8B speculative.draft_model=Qwen/Qwen3-0.6B prompt=…        guess ahead: the same text, sooner
tune run --nproc_per_node 4 generate model=Qwen/Qwen3-32B tensor_parallel_dim=4 prompt=…      a model that one device cannot hold
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from tunesmith.configs.generate import Generate
from tunesmith.configs.generate import Prompt as ChatPrompt
from tunesmith.configs.layout import Layout
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import UserError
from tunesmith.generation.beam import Beams, search_completions
from tunesmith.generation.completions import Completion, Prompt, checked_prompts, generate_completions
from tunesmith.generation.constraints import Constraint
from tunesmith.generation.engine import Drafter
from tunesmith.generation.sampling import Sampling
from tunesmith.generation.speculative import DraftModel, PromptLookup
from tunesmith.models.decoder import CausalLM
from tunesmith.parallel.device import pick_device, supports_bf16
from tunesmith.parallel.mesh import A_DAY, Mesh, Replicas, start_mesh, stop_mesh
from tunesmith.training.dtypes import DTYPES
from tunesmith.training.load import load_model
from tunesmith.training.preflight import check, check_draft
from tunesmith.training.source import describe_model, tokenizer_folder


def main(config: Generate) -> None:
    check(config)
    device = pick_device(config.device)
    if config.dtype == "bf16" and not supports_bf16(device):
        raise UserError(f"{device} has no bf16: use `dtype: fp16` or `dtype: fp32`")
    check_output(config.output_file)
    sampling = sampling_of(config)
    try:
        mesh = start_mesh(device, Layout.of(config), A_DAY)
        prompts = mesh.ranks.from_main(lambda: read_prompts(config))
        if sampling.seed is None:
            sampling = replace(sampling, seed=mesh.ranks.from_main(lambda: secrets.randbits(32)))
        _generate(config, device, mesh, prompts, sampling)
    finally:
        stop_mesh()


def _generate(
    config: Generate, device: torch.device, mesh: Mesh, prompts: list[str | ChatPrompt], sampling: Sampling
) -> None:
    family, shape = describe_model(config.model)
    # A model without a template is taken for one that continues text, unless a chat is asked for.
    is_chat = config.chat or any(isinstance(prompt, ChatPrompt) for prompt in prompts)
    templates = family.chat_templates if is_chat else ()
    tokenizer = find_tokenizer(config.tokenizer, tokenizer_folder(config.model, config.adapter), templates)
    encoded = checked_prompts(shape, tokenizer, [_as_given(prompt) for prompt in prompts], config.chat)
    if config.speculative.draft_model is not None:
        check_draft(shape, describe_model(config.speculative.draft_model)[1])
    options = {"dtype": DTYPES[config.dtype], "device": device, "quantize_base": config.quantize_base, "mesh": mesh}
    model = load_model(config.model, adapter=config.adapter, **options)
    drafter = open_drafter(config, options)

    replicas = Replicas(mesh)
    # Where prompts are shared, those of others are written meanwhile; of a search nothing is certain before its end.
    wants = len(prompts) * config.num_samples == 1 and sys.stdout.isatty() if config.stream is None else config.stream
    streams = wants and replicas.count == 1 and config.num_beams == 1
    names = [(_in_short(prompt), sample) for prompt in prompts for sample in range(config.num_samples)]
    printer = Printer(names, config.num_samples, sys.stdout)
    own = replicas.own(range(len(prompts)))
    started = time.perf_counter()
    own_prompts = [encoded[number] for number in own]
    if config.num_beams > 1:
        completions = _search(config, model, tokenizer, own_prompts, replicas)
    else:
        completions = generate_completions(
            model,
            tokenizer,
            own_prompts,
            sampling,
            batch_size=1 if streams else config.batch_size,
            on_text=printer.piece if streams and replicas.is_main else None,
            agree=replicas.agree,
            cache_tokens=config.cache_tokens,
            drafter=drafter,
            exact_logprobs=config.exact_logprobs,
            compile=config.compile,
            places=own,
        )
    completions = _gathered(replicas, list(own), completions, config.num_samples)
    if replicas.is_main:
        _show(config, printer, prompts, completions, time.perf_counter() - started, is_shown=streams)


def _search(
    config: Generate, model: CausalLM, tokenizer: Tokenizer, prompts: list[list[int]], replicas: Replicas
) -> list[Completion]:
    return search_completions(
        model,
        tokenizer,
        prompts,
        Beams(config.num_beams, config.length_penalty, config.early_stopping),
        config.max_new_tokens,
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        agree=replicas.agree,
    )


def _show(
    config: Generate,
    printer: Printer,
    prompts: list[str | ChatPrompt],
    completions: list[Completion],
    seconds: float,
    is_shown: bool,
) -> None:
    """Print what isn't shown yet, and the speed; write the file."""
    if not is_shown:
        for index, completion in enumerate(completions):
            printer.piece(index, completion.text)
    printer.close()
    count = sum(len(completion.ids) for completion in completions)
    print(f"{count} tokens in {seconds:.1f} s ({count / seconds:.0f} tokens/s)", file=sys.stderr)
    if config.output_file:
        write_texts(Path(config.output_file), prompts, completions, config.num_samples)


def sampling_of(config: Generate) -> Sampling:
    """Raises UserError for a form of the text that can't be used."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        stop=tuple(config.stop),
        seed=config.seed,
        num_samples=config.num_samples,
        constraint=constraint_of(config),
        log_probs=config.log_probs,
    )


def open_drafter(config: Generate, options: dict[str, Any]) -> Callable[[int], Drafter] | None:
    """Who guesses ahead, given the tokens that the cache holds."""
    guess = config.speculative
    if guess.prompt_lookup:
        return lambda _: PromptLookup(guess.num_tokens or 8)
    if guess.draft_model is None:
        return None
    draft = load_model(guess.draft_model, **{**options, "quantize_base": False})
    return lambda cache_tokens: DraftModel(draft, cache_tokens, guess.num_tokens or 4)


def _gathered(replicas: Replicas, own: list[int], completions: list[Completion], num_samples: int) -> list[Completion]:
    """Those of all replicas, in the prompts' order."""
    found: dict[int, list[Completion]] = {}
    for numbers, theirs in replicas.on_all(lambda: (own, completions)):
        found |= {number: theirs[i * num_samples : (i + 1) * num_samples] for i, number in enumerate(numbers)}
    return [completion for number in sorted(found) for completion in found[number]]


def constraint_of(config: Generate) -> Constraint | None:
    """The form that the text must have, read from its file if it stands in one."""
    if config.json_schema is not None:
        schema = config.json_schema
        constraint = Constraint.json_schema(_read("json_schema", schema) if isinstance(schema, str) else schema)
    elif config.regex is not None:
        constraint = Constraint.regex(config.regex)
    elif config.grammar is not None:
        is_text = re.search(r":\s|::=", config.grammar) is not None
        constraint = Constraint.grammar(config.grammar if is_text else _read("grammar", config.grammar))
    else:
        return None
    constraint.check()
    return constraint


def _read(option: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(
            f"`{option}`: {path} can't be read ({reason}): name a file, or write the {option} itself"
        ) from error


def read_prompts(config: Generate) -> list[str | ChatPrompt]:
    """The prompts that the config names, or the one on standard input."""
    try:
        prompts = _prompts(config)
        for prompt in prompts:
            # Bytes of another encoding come as letters that UTF-8 can't hold.
            (prompt if isinstance(prompt, str) else prompt.user + (prompt.system or "")).encode()
    except UnicodeError as error:
        raise UserError("a prompt is no UTF-8 text: convert it first") from error
    return prompts


def _prompts(config: Generate) -> list[str | ChatPrompt]:
    if config.prompt is None:
        if sys.stdin.isatty():
            print("Type the prompt; end it with Ctrl-D on a line of its own.", file=sys.stderr)
        text = sys.stdin.read().removesuffix("\n")
        if not text:
            raise UserError("there is no prompt: `prompt` is empty, and so is standard input; write it to one of them")
        return [text]
    prompts: list[str | ChatPrompt] = list(config.prompt) if isinstance(config.prompt, list) else [config.prompt]
    if not prompts:
        raise UserError("`prompt` is an empty list: write at least one")
    return prompts


def _as_given(prompt: str | ChatPrompt) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.user}]


def _in_short(prompt: str | ChatPrompt) -> str:
    """A prompt's beginning, on one line."""
    line = " ".join((prompt.user if isinstance(prompt, ChatPrompt) else prompt).split())
    return line if len(line) <= 60 else line[:59] + "…"


class Printer:
    """Prints texts, or pieces of texts, under a heading each where there are several."""

    def __init__(self, names: list[tuple[str, int]], num_samples: int, stream: TextIO):
        self._names, self._num_samples, self._stream = names, num_samples, stream
        self._clean: Callable[[str], str] = _harmless if stream.isatty() else str
        self._current: int | None = None

    def piece(self, index: int, text: str) -> None:
        if index != self._current:
            self._begin(index)
        self._stream.write(self._clean(text))
        self._stream.flush()

    def close(self) -> None:
        if self._current is not None:
            self._stream.write("\n")
            self._stream.flush()

    def _begin(self, index: int) -> None:
        if self._current is not None:
            self._stream.write("\n\n")
        self._current = index
        if len(self._names) > 1:
            prompt, sample = self._names[index]
            which = f", sample {sample + 1} of {self._num_samples}" if self._num_samples > 1 else ""
            total = len(self._names) // self._num_samples
            self._stream.write(self._clean(f"── {index // self._num_samples + 1} of {total}{which}: {prompt}") + "\n")


def _harmless(text: str) -> str:
    """Without control characters: what a model writes must not command the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def check_output(path: str | None) -> None:
    """Raise UserError before any work where the texts could not be written."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise UserError(f"`output_file`: there is no folder {Path(path).resolve().parent}; make it first")
    if path is not None and Path(path).is_dir():
        raise UserError(f"`output_file`: {path} is a folder; name a file in it")


def write_texts(path: Path, prompts: list[str | ChatPrompt], completions: list[Completion], num_samples: int) -> None:
    """One row {prompt, text} a completion (and the system message, and log-probabilities, where there are any)."""
    rows = []
    for index, completion in enumerate(completions):
        prompt = prompts[index // num_samples]
        row = {"prompt": prompt.user, "system": prompt.system} if isinstance(prompt, ChatPrompt) else {"prompt": prompt}
        row |= {"text": completion.text, "log_probs": completion.log_probs}
        rows.append({name: value for name, value in row.items() if value is not None})
    try:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"`output_file`: {path} could not be written ({error.strerror}): choose another") from error
