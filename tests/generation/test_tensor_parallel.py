"""Generation by ranks that hold a model together: the tokens of one process."""

import json

import pytest

from tests.distributed import run_distributed
from tests.models.conftest import pair
from tunesmith.checkpoint.hf import save_model
from tunesmith.errors import UserError
from tunesmith.hub import read_json


def generate(folder, tokenizer, out, *words):
    return [
        "generate", f"model={folder}", f"tokenizer.path={tokenizer}", "device=cpu", "dtype=fp32", "max_new_tokens=12",
        f"output_file={out}", "log_probs=true", "seed=3", *words,
    ]  # fmt: skip


def on_rank(words):
    from tunesmith.config import load_config, run

    try:
        run(load_config(*words))
    except SystemExit as error:
        return error.code
    return 0


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("words", [("tensor_parallel_dim=2",), ()], ids=["tp2", "dp2"])
@pytest.mark.parametrize("more", [("temperature=0",), ("temperature=0.8", "num_samples=3", "batch_size=2")])
def test_ranks_write_what_one_process_writes(tiny_model, tmp_path, words, more):
    prompts = "prompt=[the quick, brown fox jumps over, a]"
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    assert on_rank(generate(tiny_model, tiny_model, alone, prompts, "chat=false", *more)) == 0
    command = generate(tiny_model, tiny_model, together, prompts, "chat=false", *words, *more)
    assert run_distributed(on_rank, 2, command) == [0, 0]
    expected, found = rows_of(alone), rows_of(together)
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)


@pytest.mark.parametrize("case", ["gemma2", "phi3", "olmo2", "qwen3"])
def test_families(case, tiny_model, tmp_path):
    save_model(pair(case, vocab_size=read_json(tiny_model / "config.json")["vocab_size"])[1], tmp_path / "model")
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    prompt = "prompt=[the quick, brown]"
    assert on_rank(generate(tmp_path / "model", tiny_model, alone, prompt, "chat=false", "temperature=0")) == 0
    command = generate(
        tmp_path / "model", tiny_model, together, prompt, "chat=false", "temperature=0", "tensor_parallel_dim=2"
    )
    assert run_distributed(on_rank, 2, command) == [0, 0]
    assert [row["text"] for row in rows_of(together)] == [row["text"] for row in rows_of(alone)]


def test_heads_that_can_not_be_shared_are_refused(tiny_model, tmp_path):
    command = generate(tiny_model, tiny_model, tmp_path / "x", "prompt=a", "tensor_parallel_dim=3")
    with pytest.raises(UserError, match="`tensor_parallel_dim: 3` does not divide the model's"):
        on_rank(command)
    with pytest.raises(UserError, match="needs a multiple of 2 processes, but 1 was started"):
        on_rank([*command[:-1], "tensor_parallel_dim=2"])
