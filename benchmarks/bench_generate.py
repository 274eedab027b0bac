"""Generation: new tokens per second against transformers' generate and its continuous batching: one sequence, 8 and 32 of mixed lengths, samples."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import material
from measure import Options, Outcome, Table, be_contender, mark, median, now, ratio, run_contender

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LENGTHS = [16, 24, 40, 64, 96, 160, 320, 512]
"""Of prompts."""


@dataclass(frozen=True)
class Case:
    name: str
    prompts: list[int]
    """How long each is."""
    limits: list[int]
    """New tokens for each, in 128ths of the longest."""
    samples: int = 1
    """Drawn at temperature 1, if there are several."""


CASES = [
    Case("1 sequence", [64], [128]),
    Case("8 sequences", LENGTHS, [128, 32, 96, 16, 64, 128, 48, 80]),
    Case("32 sequences", LENGTHS * 4, [32 * (1 + (5 * row + row // 8) % 4) for row in range(32)]),
    Case("4 prompts × 8 samples", [32, 64, 128, 512], [128] * 4, samples=8),
]


def measure(folder: Path, options: Options) -> list[Table]:
    material.write_tokenizer(folder / "model")
    material.write_model(folder / "model", material.SMALL)
    longest = 16 if options.quick else 128
    arguments = {"model": str(folder / "model"), "longest": longest, "repeats": 1 if options.quick else 2}
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for _ in range(options.rounds):
        for dtype, name in itertools.product(DTYPES, CONTENDERS):
            one = run_contender(__file__, name, folder, options, **arguments, dtype=DTYPES[dtype])
            outcomes.setdefault((dtype, name), []).append(one)
    rows = []
    for dtype, case in itertools.product(DTYPES, CASES):
        speeds = {name: [_speed(one, case) for one in outcomes[dtype, name]] for name in CONTENDERS}
        mine, *others = CONTENDERS
        row = [f"{dtype}, {case.name}", median(speeds[mine])]
        for other in others:
            alike = "–" if case.samples > 1 else _alike(*(outcomes[dtype, name][0] for name in (mine, other)), case)
            row += [median(speeds[other]), ratio(speeds[mine], speeds[other]), alike]
        rows.append(row)
    headers = ["new tokens/s", "tunesmith"]
    for other in list(CONTENDERS)[1:]:
        headers += [other, "ours ×", "same texts"]
    raw = {" ".join(key): [vars(one) for one in ones] for key, ones in outcomes.items()}
    about = f"generate: prompts of 16 to 512 tokens, up to {longest} new ones each, greedy; samples at temperature 1"
    return [Table(about, headers, rows, raw)]


def _speed(outcome: Outcome, case: Case) -> float:
    return max(one["speed"] for one in outcome.named("generated") if one["case"] == case.name)


def _alike(one: Outcome, other: Outcome, case: Case) -> str:
    """How many of the sequences are the same."""
    digests = [
        next(m["digests"] for m in outcome.named("generated") if m["case"] == case.name) for outcome in (one, other)
    ]
    return f"{sum(a == b for a, b in zip(*digests))} of {len(digests[0])}"


def _prompts(case: Case, run: int) -> list[list[int]]:
    """Ids that no tokenizer is needed for, the same for all contenders; others in each run, so that no cache answers for the one before."""
    return [
        [(17 * row + 31 * place + 1009 * run) % 8000 + 100 for place in range(length)]
        for row, length in enumerate(case.prompts)
    ]


def _limits(case: Case, longest: int) -> list[int]:
    return [limit * longest // 128 for limit in case.limits]


def _time(case: Case, repeats: int, generate: Callable[[list[list[int]]], list[list[int]]]) -> None:
    generate(_prompts(case, 0))
    for run in range(repeats):
        prompts = _prompts(case, run + 1)
        started = now()
        texts = generate(prompts)
        seconds = now() - started
        digests = [hashlib.sha256(repr(ids).encode()).hexdigest()[:16] for ids in texts]
        mark("generated", case=case.name, speed=sum(map(len, texts)) / seconds, digests=digests)


def ours(model: str, dtype: str, longest: int, repeats: int) -> None:
    import tunesmith
    from tunesmith.generation.completions import generate_completions
    from tunesmith.generation.sampling import Sampling

    network, tokenizer = tunesmith.load_model(model, dtype=dtype), tunesmith.load_tokenizer(model)
    for case in CASES:
        heat = 1.0 if case.samples > 1 else 0.0
        samplings = [Sampling(limit, heat, num_samples=case.samples, stop_ids=()) for limit in _limits(case, longest)]

        def generate(prompts: list[list[int]]) -> list[list[int]]:
            made = generate_completions(network, tokenizer, prompts, samplings, batch_size=32)  # noqa: B023
            return [one.ids for one in made]

        _time(case, repeats, generate)


def theirs(model: str, dtype: str, longest: int, repeats: int) -> None:
    """All sequences go on until the longest is complete; what was not asked for is not counted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    for case in CASES:
        limits = _limits(case, longest)
        options = {
            "max_new_tokens": max(limits),
            "min_new_tokens": max(limits),
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        draw = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": case.samples}
        options |= draw if case.samples > 1 else {"do_sample": False}

        def generate(prompts: list[list[int]]) -> list[list[int]]:
            inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
            with torch.inference_mode():
                ids = network.generate(**inputs, **options)[:, max(map(len, prompts)) :].tolist()  # noqa: B023
            wanted = [text[: limits[row // case.samples]] for row, text in enumerate(ids)]  # noqa: B023
            tokenizer.batch_decode(wanted, skip_special_tokens=True)  # tunesmith returns text too
            return wanted

        _time(case, repeats, generate)


def their_batching(model: str, dtype: str, longest: int, repeats: int) -> None:
    """The manager is kept between runs, as a server would; its cache holds what the case needs, and of the passes tried here, those of 128 tokens were the fastest."""
    import logging

    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    logging.disable(logging.WARNING)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for case in CASES:
        draw = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": case.samples}
        sampling = draw if case.samples > 1 else {"do_sample": False}
        blocks = case.samples * sum((length + longest) // 256 + 2 for length in case.prompts)
        with network.continuous_batching_context_manager(
            generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, max_new_tokens=longest, **sampling),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=128),
        ) as manager:

            def generate(prompts: list[list[int]]) -> list[list[int]]:
                asked = zip(prompts, _limits(case, longest))  # noqa: B023
                names = [manager.add_request(ids, max_new_tokens=limit) for ids, limit in asked]  # noqa: B023
                made: dict[str, list[int]] = {}
                while len(made) < len(names) * case.samples:  # noqa: B023
                    result = manager.get_result(timeout=1)  # noqa: B023
                    if result is not None and result.is_finished():
                        made[result.request_id] = result.generated_tokens
                texts = [made[name] for name in (names if case.samples == 1 else made)]  # noqa: B023
                tokenizer.batch_decode(texts, skip_special_tokens=True)
                return texts

            _time(case, repeats, generate)


CONTENDERS = {"tunesmith": ours, "generate": theirs, "continuous batching": their_batching}
"""The last two are transformers'."""

if __name__ == "__main__":
    be_contender(CONTENDERS)
