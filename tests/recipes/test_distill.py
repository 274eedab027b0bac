"""The distill recipe as a user runs it: the same numbers for every cut, layout and kind of weights, cached teachers, exact resume, refusals."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file

from tunesmith.config import load_config, run
from tunesmith.errors import ConfigError, UserError

WEIGHTS = {"full": [], "lora": ["+lora"], "dora": ["+dora", "weights.target_modules=[q_proj,lm_head]"], "qlora": ["+qlora"]}  # fmt: skip
LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "hsdp": (2, ["data_parallel_replicate_dim=2"]),
    "tp2": (2, ["tensor_parallel_dim=2"]),
    "cp2": (2, ["context_parallel_dim=2"]),
    "pp2": (2, ["pipeline_parallel_dim=2"]),
    "pp2 zbv": (2, ["pipeline_parallel_dim=2", "pipeline_parallel_schedule=ZBVZeroBubble"]),
    "dp2 x tp2": (4, ["tensor_parallel_dim=2"]),
    "dp2 x pp2": (4, ["pipeline_parallel_dim=2"]),
}
COMMON = """distill dtype=fp32 device=cpu max_steps=3 optimizer.type=sgd optimizer.lr=0.05 lr_scheduler.type=constant clip_grad_norm=1.0
global_batch_size=8 tokenizer.max_seq_len=64 loss.chunk_size=16 divergence.type=jsd divergence.temperature=1.5""".split()


def make_model(folder: Path, like: Path, seed=3, hidden=48, layers=3, vocabulary=320, tied=False, **more) -> Path:
    """A random Llama of another size with the tokenizer of `like`."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / file, folder)
    numbers = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    config = {**json.loads((like / "config.json").read_text()), **numbers, **more}
    (folder / "config.json").write_text(json.dumps(config))
    inner, heads = config["intermediate_size"], config["num_attention_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes |= {} if tied else {"lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {name + f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {name + "self_attn.q_proj.weight": (heads, hidden), name + "self_attn.o_proj.weight": (hidden, heads)}
        shapes |= {name + f"self_attn.{p}_proj.weight": (heads // 2, hidden) for p in "kv"}
        shapes |= {name + f"mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {name + "mlp.down_proj.weight": (hidden, inner)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        n: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "plain": make_model(folder / "plain", tiny_model),
        "tied": make_model(folder / "tied", tiny_model, tied=True, layers=5),
        "padded": make_model(folder / "padded", tiny_model, vocabulary=332),
        "cut": make_model(folder / "cut", tiny_model, vocabulary=318),
    }


def run_recipe(words, folder):
    """On a rank: `tune run` of the words; its exit code."""
    try:
        run(load_config(*words, f"output_dir={folder}"))
    except SystemExit as error:
        return error.code
    return 0


def train(words, folder, layout="one"):
    processes, more = LAYOUTS[layout]
    if processes == 1:
        assert run_recipe([*words, *more], folder) == 0
    else:
        assert run_distributed(run_recipe, processes, [*words, *more], folder) == [0] * processes
    return result(folder)


def result(folder):
    """(numbers of each step and validation, final weights)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "kd_loss", "ce_loss", "grad_norm", "val_loss", "val_kd_loss", "val_ce_loss")
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    [file] = [*newest.glob("model*.safetensors"), *newest.glob("adapter*.safetensors")]
    return [{key: row[key] for key in keys if key in row} for row in rows], load_file(file)


def assert_same(found, expected, tolerance=1e-5):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-6), (ours, theirs)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        error = ((found[1][name] - tensor).norm() / tensor.norm()).item()
        assert error < tolerance, (name, error)


def words_of(tiny_model, chat_file, teacher, weights="full", packed=False):
    data = [
        f"model={tiny_model}",
        f"teacher.model={teacher}",
        f"dataset.source={chat_file}",
        f"dataset.packed={packed}",
    ]
    return [*COMMON, *data, f"dataset_val.source={chat_file}", "max_val_steps=2", *WEIGHTS[weights]]


# Each layout meets some teachers, kinds of weights, packed and padded rows and sizes of micro-batch; all of them in `make test-all`.
SOME = [("one", "full", "plain", False, 2), ("dp2", "full", "tied", True, 2), ("tp2", "lora", "padded", False, 4)]
MORE = [
    ("one", "lora", "tied", True, 1),
    ("one", "qlora", "plain", False, 2),
    ("one", "dora", "cut", True, 2),
    ("dp2", "qlora", "padded", False, 1),
    ("dp2", "dora", "cut", True, 4),
    ("hsdp", "full", "tied", False, 2),
    ("tp2", "full", "cut", True, 2),
    ("tp2", "dora", "tied", False, 4),
    ("pp2", "full", "tied", True, 2),
    ("pp2", "qlora", "padded", False, 1),
    ("pp2", "dora", "plain", False, 4),
    ("pp2 zbv", "full", "tied", False, 1),
    ("cp2", "full", "padded", False, 2),
    ("cp2", "lora", "tied", True, 8),
    ("cp2", "qlora", "plain", False, 4),
    ("dp2 x tp2", "dora", "padded", False, 2),
    ("dp2 x pp2", "lora", "tied", True, 2),
]


@pytest.mark.parametrize(
    ("layout", "weights", "teacher", "packed", "batch_size"),
    [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_neither_cut_nor_layout_changes_a_number(
    layout, weights, teacher, packed, batch_size, teachers, tmp_path, tiny_model, chat_file
):
    student = make_model(tmp_path / "student", tiny_model, layers=4) if "zbv" in layout else tiny_model
    words = words_of(student, chat_file, teachers[teacher], weights, packed)
    words += ["pipeline_parallel_layers_per_stage=1"] if layout == "pp2" else []
    expected = train([word for word in words if "per_stage" not in word] + ["batch_size=8"], tmp_path / "one")
    assert_same(train([*words, f"batch_size={batch_size}", "batch_size_val=8"], tmp_path / "run", layout), expected)


def test_a_student_that_is_its_teacher_has_no_divergence_and_nothing_to_learn(tmp_path, tiny_model, chat_file):
    words = words_of(tiny_model, chat_file, tiny_model)
    steps, _ = train([*words, "kd_ratio=1.0", "batch_size=2"], tmp_path / "run")
    assert all(
        row["kd_loss"] < 1e-7 and row["loss"] < 1e-7 and row["grad_norm"] < 1e-4 for row in steps if "loss" in row
    )
