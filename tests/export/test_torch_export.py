"""torch.export programs: read by PyTorch alone, in another process, they say what the engine says."""

import json
import subprocess
import sys

import pytest
import torch

from tests.export.greedy import FAMILIES, PROMPT, STEPS, expected_tokens, export_to, program_tokens, save_model
from tunesmith.configs.export import ProgramFile

FAST = ("llama", "gemma3_text")


def load(path):
    program = torch.export.load(path).module()
    return lambda tokens, position: program(tokens, torch.tensor([position])).flatten(0, -2)


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES]
)
def test_greedy_tokens_are_the_engines(case, tmp_path):
    model = save_model(case, tmp_path / "model")
    facts = export_to(tmp_path / "out", model, "torch_export", program=ProgramFile(max_length=32, max_chunk=8))
    assert (facts["max_length"], facts["max_tokens_per_call"], facts["stop_ids"]) == (32, 8, [2])
    assert program_tokens(load(tmp_path / "out" / "model.pt2")) == expected_tokens(model)


def test_another_process_without_tunesmith(tmp_path):
    model = save_model("llama", tmp_path / "model")
    export_to(tmp_path / "out", model, "torch_export", program=ProgramFile(max_length=32))
    code = f"""
import json, sys, torch
sys.modules["tunesmith"] = None
program, ids = torch.export.load("model.pt2").module(), {PROMPT}
logits = program(torch.tensor([ids]), torch.tensor([0]))
for position in range(len(ids), len(ids) + {STEPS}):
    ids.append(int(logits[0].argmax()))
    logits = program(torch.tensor([ids[-1:]]), torch.tensor([position]))
print(json.dumps(ids[{len(PROMPT)}:]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True)
    assert json.loads(found.stdout or "null") == expected_tokens(model), found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_all_logits_and_sizes_of_calls(tmp_path, chunk):
    model = save_model("qwen3", tmp_path / "model")
    options = ProgramFile(max_length=16, max_chunk=chunk, all_logits=True)
    facts = export_to(tmp_path / "out", model, "torch_export", program=options)
    assert facts["outputs"][0]["shape"] == [1, "T" if chunk > 1 else 1, 101]
    call = load(tmp_path / "out" / "model.pt2")
    assert call(torch.ones(1, chunk, dtype=torch.long), 0).shape == (chunk, 101)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(tmp_path, dtype):
    model = save_model("gemma2", tmp_path / "model")
    facts = export_to(tmp_path / "out", model, "torch_export", dtype=dtype, program=ProgramFile(max_length=32))
    assert facts["outputs"][0]["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]


def test_real_model(assets, tmp_path):
    model = assets / "models" / "stories260K"
    facts = export_to(tmp_path / "out", model, "torch_export")
    assert (facts["bos_id"], facts["stop_ids"]) == (1, [1, 2])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    prompt = [1, 403, 407, 261, 378]
    assert program_tokens(load(tmp_path / "out" / "model.pt2"), prompt, 60) == expected_tokens(model, prompt, 60)
