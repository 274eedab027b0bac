"""What tests of programs share: a tiny model of each family in a folder, and greedy continuations by a program and by the engine."""

import json
from pathlib import Path

import torch

from tests.generation.test_engine import Letters
from tests.models.conftest import config_json, make_reference, tokens
from tunesmith.configs.export import Export
from tunesmith.generation.completions import generate_completions
from tunesmith.generation.sampling import Sampling
from tunesmith.recipes import export
from tunesmith.training.load import load_model

FAMILIES = (
    "llama", "mistral window", "qwen2 tied windows", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3 partial tied", "olmo2",
)  # fmt: skip
"""One of tests.models.conftest.CASES each, the most particular one."""
STEPS = 12
PROMPT = tokens(1, 9)[0].tolist()
"""With STEPS it is longer than the windows of these models."""


def save_model(case: str, folder: Path, **more) -> Path:
    """The repository of a tiny model with random weights, without a tokenizer."""
    reference = make_reference(case, **more)
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_json(reference)))
    return folder


def export_to(output: Path, model: Path, format: str, **options) -> dict:
    """Export, and return what program.json says."""
    export.main(Export(model=str(model), output_dir=str(output), format=format, **options))
    return json.loads((output / "program.json").read_text())


def expected_tokens(folder: Path, prompt=PROMPT, steps: int = STEPS) -> list[int]:
    """By the engine."""
    sampling = Sampling(max_new_tokens=steps, temperature=0.0, stop_ids=())
    return generate_completions(load_model(folder, dtype="float32"), Letters(), [prompt], sampling)[0].ids


def program_tokens(call, prompt=PROMPT, steps: int = STEPS) -> list[int]:
    """By a program: `call` takes tokens (1, T) and a position, and gives logits (n, V). The prompt is read in two calls."""
    middle = len(prompt) // 2
    call(torch.tensor([prompt[:middle]]), 0)
    logits = call(torch.tensor([prompt[middle:]]), middle)
    found = [int(logits[-1].argmax())]
    while len(found) < steps:
        logits = call(torch.tensor([found[-1:]]), len(prompt) + len(found) - 1)
        found.append(int(logits[-1].argmax()))
    return found
