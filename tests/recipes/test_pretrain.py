"""What is special to pre-training runs: honest metrics, determinism, bf16 states, garbage collection; on one process and two."""

import gc
import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file

from tunesmith.config import load_config, run

NUMBERS = ("loss", "grad_norm", "lr", "num_tokens", "num_trained")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 300)
    return path


def words(folder, tiny_model, text, *more):
    return [
        "pretrain", f"model={tiny_model}", f"dataset.source={text}", f"output_dir={folder}", "device=cpu", "dtype=fp32", "batch_size=2",
        "tokenizer.max_seq_len=32", "max_steps=4", *more,
    ]  # fmt: skip


def train(*arguments):
    run(load_config(*words(*arguments)))
    return rows(arguments[0])


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def numbers(rows):
    return [[row[name] for name in NUMBERS] for row in rows]


def test_metrics_of_a_run(tmp_path, tiny_model, text):
    row = train(tmp_path / "run", tiny_model, text)[-1]
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    seen = 2 * 2 * (32 * 33 // 2)  # layers x rows x pairs in a row, which is one document
    flops = 6 * matrices * 64 + 6 * 320 * 64 * row["num_trained"] + 12 * 4 * 16 * seen
    assert row["tflops_per_device"] * row["step_seconds"] * 1e12 == pytest.approx(flops)
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(64)
    assert "mfu" not in row and row["peak_memory_gib"] > 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Model FLOP/s" in report


def test_slow_data_are_told(tmp_path, tiny_model, text, monkeypatch):
    """The wait is measured around the reading itself: torchtitan's clock once started behind it."""
    import time

    from tunesmith.data.loader import Batches

    step = Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, number: (time.sleep(0.2), step(self, number))[1])
    row = train(tmp_path / "run", tiny_model, text)[-1]
    assert 0.2 <= row["data_seconds"] < row["step_seconds"]


def test_a_line_tells_of_all_steps_since_the_one_before(tmp_path, tiny_model, text, monkeypatch):
    import time

    from tunesmith.data.loader import Batches

    step = Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, number: (time.sleep(0.3 * (number == 3)), step(self, number))[1])
    first, second = train(tmp_path / "run", tiny_model, text, "log_every_n_steps=2")
    assert first["step"] == 2 and first["data_seconds"] < 0.1
    assert second["step"] == 4 and 0.15 <= second["data_seconds"] < second["step_seconds"]
    assert second["tokens_per_second"] * second["step_seconds"] == pytest.approx(64)


def test_deterministic_runs_are_equal_and_leave_the_mode(tmp_path, tiny_model, text):
    try:
        first = train(tmp_path / "a", tiny_model, text, "deterministic=true")
        assert torch.are_deterministic_algorithms_enabled()
        assert numbers(first) == numbers(train(tmp_path / "b", tiny_model, text, "deterministic=true"))
        train(tmp_path / "c", tiny_model, text)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_garbage_collection_is_on_after_the_run_and_after_an_error(tmp_path, tiny_model, text, monkeypatch):
    from tunesmith.training.run import Run

    train(tmp_path / "a", tiny_model, text, "gc_every_n_steps=2")
    assert gc.isenabled()
    log = Run.log

    def fail(self, step, stats, **more):
        assert not gc.isenabled()
        log(self, step, stats, **more)
        raise RuntimeError("on the way")

    monkeypatch.setattr(Run, "log", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        train(tmp_path / "b", tiny_model, text, "gc_every_n_steps=2")
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("dtype", [[], ["dtype=bf16", "param_dtype=fp32"]], ids=["fp32", "master"])
def test_bf16_states_resume_to_the_bit(tmp_path, tiny_model, text, dtype):
    more = ["optimizer.state_dtype=bf16", *dtype]
    through = train(tmp_path / "a", tiny_model, text, *more, "save_every_n_steps=2")
    stored = load_file(tmp_path / "a" / "checkpoints" / "step-00000004" / "resume" / "optimizer.safetensors")
    kinds = {tensor.dtype for name, tensor in stored.items() if "exp_avg" in name}
    assert kinds == {torch.bfloat16}
    train(tmp_path / "b", tiny_model, text, *more, "save_every_n_steps=2")
    (tmp_path / "b" / "checkpoints" / "latest").write_text("step-00000002\n")
    import shutil

    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    resumed = train(tmp_path / "b", tiny_model, text, *more, "resume_from_checkpoint=true")
    assert numbers(resumed) == numbers(through)
    weights = [load_file(tmp_path / name / "checkpoints" / "step-00000004" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def train_on_ranks(words):
    run(load_config(*words))


def test_two_ranks(tmp_path, tiny_model, text):
    more = ["optimizer.state_dtype=bf16", "gc_every_n_steps=2", "profiler.enabled=true", "profiler.wait_steps=0"]
    more += ["profiler.warmup_steps=1", "profiler.active_steps=1", "profiler.memory_snapshot_every_n_steps=2"]
    alone = train(tmp_path / "one", tiny_model, text, *more, "batch_size=4")
    run_distributed(train_on_ranks, 2, words(tmp_path / "two", tiny_model, text, *more))
    both = rows(tmp_path / "two")
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    for one, two in zip(alone, both):
        work = [row["tflops_per_device"] * row["step_seconds"] for row in (one, two)]
        assert work[1] == pytest.approx(work[0] / 2)
        assert two["tokens_per_second_per_device"] == pytest.approx(two["tokens_per_second"] / 2)
    names = sorted(path.name for path in (tmp_path / "two" / "profile").iterdir())
    assert names == [
        f"{kind}-rank{rank}-step000002.{end}"
        for kind, end in (("operators", "txt"), ("trace", "json.gz"))
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("size", ["llama3/8B", "qwen3/0.6B", "gemma2/2B", "gemma3/1B", "smollm2/135M"])
def test_a_named_size_from_scratch(tmp_path, tiny_model, text, size):
    from tunesmith.models.families import named_sizes

    if size not in named_sizes():
        pytest.skip("not a named size")
    shape = "{num_hidden_layers: 2, hidden_size: 64, intermediate_size: 96, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, vocab_size: 320}"
    family, hf, _ = named_sizes()[size]
    more = [f"model={size}", f"model_args={shape}", f"tokenizer.path={tiny_model}"]
    if "layer_types" in hf:
        more[1] = more[1].replace("{num", f"{{layer_types: {hf['layer_types'][:2]}, num")
    losses = [row["loss"] for row in train(tmp_path / "run", tiny_model, text, *more)]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(320.0)).item(), rel=0.1) and losses[-1] < losses[0]
