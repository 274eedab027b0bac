"""Generation: new tokens per second against transformers' generate, one prompt at a time and eight of different lengths."""

from __future__ import annotations

import hashlib
from pathlib import Path

import material
from measure import Options, Outcome, Table, be_contender, mark, median, now, ratio, run_contender

CASES = {"batch 1": [64], "batch 8, prompts of 16 to 128 tokens": [16, 24, 40, 56, 72, 96, 112, 128]}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure(folder: Path, options: Options) -> list[Table]:
    material.write_tokenizer(folder / "model")
    material.write_model(folder / "model", material.SMALL)
    new_tokens = 32 if options.quick else 128
    arguments = {"model": str(folder / "model"), "new_tokens": new_tokens, "repeats": 1 if options.quick else 3}
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    for _ in range(options.rounds):
        for dtype in DTYPES:
            for name in CONTENDERS:
                one = run_contender(__file__, name, folder, options, **arguments, dtype=DTYPES[dtype])
                outcomes.setdefault((dtype, name), []).append(one)
    rows = []
    for dtype in DTYPES:
        for case in CASES:
            speeds = {name: [_speed(one, case) for one in outcomes[dtype, name]] for name in CONTENDERS}
            ours, theirs = (outcomes[dtype, name][0] for name in CONTENDERS)
            same = _tokens(ours, case) == _tokens(theirs, case)
            ratios = ratio(speeds["tunesmith"], speeds["transformers"])
            rows.append([f"{dtype}, {case}", *map(median, speeds.values()), ratios, "yes" if same else "no"])
    headers = ["new tokens/s", *CONTENDERS, "ours ×", "same tokens"]
    raw = {" ".join(key): [vars(one) for one in ones] for key, ones in outcomes.items()}
    return [Table(f"generate: {new_tokens} new tokens, greedy", headers, rows, raw)]


def _speed(outcome: Outcome, case: str) -> float:
    return max(one["speed"] for one in outcome.named("generated") if one["case"] == case)


def _tokens(outcome: Outcome, case: str) -> str:
    return next(one["digest"] for one in outcome.named("generated") if one["case"] == case)


def _prompts(lengths: list[int]) -> list[list[int]]:
    """Ids that no tokenizer is needed for, the same for all."""
    return [[(17 * row + 31 * place) % 8000 + 100 for place in range(length)] for row, length in enumerate(lengths)]


def _time(case: str, repeats: int, generate) -> None:
    generate()
    for _ in range(repeats):
        started = now()
        ids = generate()
        seconds = now() - started
        mark(
            "generated",
            case=case,
            speed=sum(map(len, ids)) / seconds,
            digest=hashlib.sha256(repr(ids).encode()).hexdigest(),
        )


def ours(model: str, dtype: str, new_tokens: int, repeats: int) -> None:
    import tunesmith
    from tunesmith.generation.completions import generate_completions
    from tunesmith.generation.sampling import Sampling

    network, tokenizer = tunesmith.load_model(model, dtype=dtype), tunesmith.load_tokenizer(model)
    sampling = Sampling(max_new_tokens=new_tokens, stop_ids=())
    for case, lengths in CASES.items():
        prompts = _prompts(lengths)
        _time(case, repeats, lambda: [one.ids for one in generate_completions(network, tokenizer, prompts, sampling)])  # noqa: B023


def theirs(model: str, dtype: str, new_tokens: int, repeats: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    for case, lengths in CASES.items():
        inputs = tokenizer.pad({"input_ids": _prompts(lengths)}, return_tensors="pt")
        width = inputs["input_ids"].shape[1]

        def generate():
            with torch.inference_mode():
                ids = network.generate(**inputs, **options, pad_token_id=0)[:, width:]  # noqa: B023
            tokenizer.batch_decode(ids, skip_special_tokens=True)  # tunesmith returns text too
            return ids.tolist()

        _time(case, repeats, generate)


CONTENDERS = {"tunesmith": ours, "transformers": theirs}

if __name__ == "__main__":
    be_contender(CONTENDERS)
