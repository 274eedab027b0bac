"""Every cell of the grid: each method trains each kind of weights to the same numbers on one process, with weights cut over two, and with matrices
cut over two, whatever the micro-batch; resumes exactly; and what it saves is read back.

In `make test` each method and each kind of weights is met; `make test-all` runs every cell.
"""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tunesmith
from tests.runs import COMMON, assert_same, train
from tunesmith.configs.grid import METHODS, WEIGHTS, cell, markdown

ROOT = Path(__file__).parents[2]
TINY = Path(tunesmith.__file__).parent / "assets" / "tiny"
"""Large enough for a matrix of 4-bit numbers to be cut over two ranks."""
WORDS = "the quick brown fox jumps over lazy dog".split()


def said(start, count):
    return " ".join(WORDS[(start + 3 * j) % 8] for j in range(count))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """{method: a file of its rows}."""
    folder, numbers = tmp_path_factory.mktemp("rows"), range(16)
    questions = [said(i, 2 + i % 6) for i in numbers]
    pairs = [
        {"prompt": questions[i], "chosen": said(i + 1, 1 + i % 5), "rejected": said(i + 2, 2 + i % 4)} for i in numbers
    ]
    chats = [{"prompt": questions[i], "completion": said(i + 1, 1 + i % 5)} for i in numbers]
    content = {
        "pretrain": [{"text": said(i, 20 + 3 * i)} for i in numbers],
        "sft": chats,
        "preference": pairs,
        "reward": pairs,
        "distill": chats,
    }
    files = {}
    for method, lines in content.items():
        files[method] = folder / f"{method}.jsonl"
        files[method].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def words_of(method, weights, rows):
    needs = {"distill": [f"teacher.model={TINY}", "divergence.type=jsd"]}.get(method, [])
    # Inputs rounded to 8 bits turn the last digit of a sum into a whole level here and there: tests/recipes/test_qat.py says how far.
    needs = [*needs, *(["qat.type=int4_weight_only"] if "qat" in weights else [])]
    if method == "pretrain":
        needs += ["from_scratch=false"] if cell(method, weights) != "yes" else ["dataset.packed=true"]
    return [method, *WEIGHTS[weights], *COMMON, "global_batch_size=4", f"model={TINY}", f"dataset.source={rows[method]}", *needs]  # fmt: skip


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    done = {}

    def result(words):
        key = " ".join(words)
        if key not in done:
            folder = tmp_path_factory.mktemp("one") / "run"
            done[key] = train([*words, "batch_size=4"], folder), folder
        return done[key]

    return result


CELLS = list(product(METHODS, WEIGHTS))
SCALES = ("one", "dp2", "tp2")
SOME = [
    ("pretrain", "qat", "dp2"),
    ("sft", "qat + lora", "tp2"),
    ("preference", "qat", "one"),
    ("preference", "qlora", "dp2"),
    ("preference", "dora", "tp2"),
    ("reward", "lora", "dp2"),
    ("reward", "qat + lora", "one"),
    ("distill", "full", "dp2"),
    ("distill", "qlora", "tp2"),
]
ALL = [(*one, scale) for one in CELLS for scale in SCALES if (*one, scale) not in SOME]


@pytest.mark.parametrize(
    ("method", "weights", "scale"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]
)
def test_every_cell_gives_the_same_numbers(method, weights, scale, rows, on_one, tmp_path):
    words = words_of(method, weights, rows)
    expected, _ = on_one(words)
    assert_same(train([*words, "batch_size=1"], tmp_path / "run", scale), expected)


FLOAT8 = [case for case in product(METHODS, SCALES) if case != ("sft", "tp2")]


@pytest.mark.parametrize(
    ("method", "scale"), [("sft", "tp2"), *(pytest.param(*case, marks=pytest.mark.slow) for case in FLOAT8)]
)
def test_each_method_trains_for_float8(method, scale, rows, on_one, tmp_path):
    """At weights that stand still: after an update some of so many levels hang on the last digit of a sum."""
    words = [*words_of(method, "qat", rows), "qat.type=float8_weight_only", "optimizer.lr=0.0"]
    expected, _ = on_one(words)
    assert_same(train([*words, "batch_size=1"], tmp_path / "run", scale), expected)


IN_FULL = [("sft", "qlora"), ("reward", "dora")]
REST = [pytest.param(*one, marks=pytest.mark.slow) for one in CELLS if one not in IN_FULL]


@pytest.mark.parametrize(("method", "weights"), [*IN_FULL, *REST])
def test_every_cell_is_exported_for_transformers(method, weights, rows, on_one, tmp_path):
    """Adapters merged, those over 4-bit weights into the base as it was before."""
    _, folder = on_one(words_of(method, weights, rows))
    checkpoint, exported = folder / "checkpoints" / "latest", tmp_path / "exported"
    tunesmith.run(tunesmith.load_config("export", f"model={checkpoint}", f"output_dir={exported}", "dtype=fp32"))
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        theirs = kind.from_pretrained(exported, dtype=torch.float32).eval()(ids).logits
        ours, trained = (
            model.scores(ids) if method == "reward" else model.logits(ids)
            for model in (tunesmith.load_model(one, dtype="float32") for one in (exported, checkpoint))
        )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    if weights != "qlora":
        torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "weights"), CELLS)
def test_every_cell_resumes_exactly_and_is_read_back(method, weights, rows, on_one, tmp_path):
    words = words_of(method, weights, rows)
    whole, folder = on_one(words)
    train([*words, "batch_size=4", "max_steps=2"], tmp_path / "run")
    parts = train([*words, "batch_size=4", "resume_from_checkpoint=true"], tmp_path / "run")
    assert parts[0] == whole[0]
    assert all(torch.equal(parts[1][name], tensor) for name, tensor in whole[1].items())
    model = tunesmith.load_model(folder / "checkpoints" / "latest")
    ids = torch.arange(3, 11)[None]
    values = model.scores(ids) if method == "reward" else model.logits(ids)
    assert values.isfinite().all()
    if "qat" in weights:
        quantized = tunesmith.load_model(folder / "quantized")
        rounded = quantized.scores(ids) if method == "reward" else quantized.logits(ids)
        assert rounded.isfinite().all() and not torch.equal(rounded, values)


def test_the_readme_shows_the_grid():
    assert markdown() in (ROOT / "README.md").read_text()
