"""The distill recipe as a user runs it: the same numbers for every cut, layout and kind of weights, cached teachers, exact resume, refusals."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file

from tests import runs
from tests.runs import run_recipe
from tunesmith.config import load_config, run
from tunesmith.errors import ConfigError, UserError

WEIGHTS = {"full": [], "lora": ["+lora"], "dora": ["+dora", "weights.target_modules=[q_proj,lm_head]"], "qlora": ["+qlora"]}  # fmt: skip
LAYOUTS = {
    **runs.LAYOUTS,
    "one": (1, []),
    "pp2 zbv": (2, ["pipeline_parallel_dim=2", "pipeline_parallel_schedule=ZBVZeroBubble"]),
}
OWN = "max_steps=3 loss.chunk_size=16 divergence.type=jsd divergence.temperature=1.5".split()
COMMON = ["distill", *runs.COMMON, *OWN]


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


def run_on_a_rank(words, folder, cache):
    os.environ["TUNESMITH_CACHE"] = cache  # ranks have the environment of the first test that started some
    return run_recipe(words, folder)


def train(words, folder, layout="one"):
    processes, more = LAYOUTS[layout]
    words = [*words, *more]
    if processes == 1:
        assert run_recipe(words, folder) == 0
    else:
        codes = run_distributed(run_on_a_rank, processes, words, folder, os.environ["TUNESMITH_CACHE"])
        assert codes == [0] * processes
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


# --- cached teachers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    ["one", *(pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS if one != "one" and "zbv" not in one)],
)
def test_all_likeliest_tokens_from_the_cache_are_the_teacher_itself(
    layout, teachers, tmp_path, tiny_model, chat_file, monkeypatch
):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    words = [*words_of(tiny_model, chat_file, teachers["tied"], packed=True), "batch_size=2", "batch_size_val=8"]
    expected = train(words, tmp_path / "live")
    assert_same(train([*words, "teacher.cache_top_k=1000"], tmp_path / "cached", layout), expected)
    folders = list((tmp_path / "cache" / "teachers").iterdir())
    assert len(folders) == 1 and not folders[0].name.startswith("."), "both sets of data are the same file"


def test_the_cache_is_made_once_and_serves_other_runs_and_a_resume(
    teachers, tmp_path, tiny_model, chat_file, monkeypatch
):
    """Also with other rows, order and size of steps; the teacher isn't even loaded."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    words = [*words_of(tiny_model, chat_file, teachers["padded"]), "teacher.cache_top_k=5", "batch_size=2"]
    through = train(words, tmp_path / "through")
    made = []
    monkeypatch.setattr("tunesmith.training.teacher.build_frozen", lambda *arguments: made.append(arguments))
    assert result_equals(train(words, tmp_path / "again"), through)
    for steps in (1, 3):
        found = train([*words, f"max_steps={steps}", "resume_from_checkpoint=true"], tmp_path / "stopped")
    assert result_equals((found[0][-2:], found[1]), (through[0][-2:], through[1]))
    train([*words, "dataset.packed=true", "seed=5", "max_steps=1", "global_batch_size=4"], tmp_path / "other")
    assert not made
    [folder] = (tmp_path / "cache" / "teachers").iterdir()
    content = bytearray((folder / "ids").read_bytes())
    content[3] ^= 1
    (folder / "ids").write_bytes(content)
    monkeypatch.undo()
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    assert result_equals(train(words, tmp_path / "mended"), through)


def result_equals(found, expected):
    same = found[1].keys() == expected[1].keys() and all(
        torch.equal(found[1][name], t) for name, t in expected[1].items()
    )
    return same and found[0] == expected[0]


# --- stops and refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["one", pytest.param("dp2", marks=pytest.mark.slow)])
def test_stop_and_resume_equals_never_stopped(layout, teachers, tmp_path, tiny_model, chat_file):
    words = words_of(tiny_model, chat_file, teachers["tied"], "lora", True)
    words += ["batch_size=2", "optimizer.type=adamw", "weights.dropout=0.1", "run_val_every_n_steps=1"]
    through = train([*words, "max_steps=4"], tmp_path / "through", layout)
    for steps in (2, 4):
        found = train([*words, f"max_steps={steps}", "resume_from_checkpoint=true"], tmp_path / "run", layout)
    assert result_equals(found, through)


def test_a_resume_keeps_its_teacher(teachers, tmp_path, tiny_model, chat_file):
    words = [
        *words_of(tiny_model, chat_file, teachers["plain"]),
        "max_steps=1",
        f"output_dir={tmp_path / 'run'}",
        "batch_size=8",
    ]
    run(load_config(*words))
    words = [word for word in words if not word.startswith("teacher")] + [
        f"teacher.model={teachers['padded']}",
        "max_steps=2",
    ]
    with pytest.raises(UserError, match="the teacher changed"):
        run(load_config(*words, "resume_from_checkpoint=true"))


def other_tokens(folder: Path, like: Path, change) -> Path:
    folder = make_model(folder, like)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def swap(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["A"] = vocabulary["A"], vocabulary["!"]


def rename(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\u00e9\u00e9"] = vocabulary.pop("A")


REFUSED = {
    "another order": (lambda folder, like: other_tokens(folder, like, swap), "has another vocabulary .* is token"),
    "other words": (lambda folder, like: other_tokens(folder, like, rename), "has another vocabulary"),
    "fewer rows": (
        lambda folder, like: make_model(folder, like, vocabulary=200),
        "token [0-9]+ lies behind the 200 rows",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_teacher_of_other_tokens_is_refused(kind, tmp_path, tiny_model, chat_file):
    from tunesmith.training.preflight import check

    make, sentence = REFUSED[kind]
    config = load_config(
        *words_of(tiny_model, chat_file, make(tmp_path / "teacher", tiny_model)), f"output_dir={tmp_path / 'run'}"
    )
    with pytest.raises(ConfigError, match=sentence):
        check(config)


def test_without_tokens_to_compare_the_sizes_must_agree(teachers, tmp_path, tiny_model, chat_file):
    for name, vocabulary in (("same", 320), ("other", 328)):
        folder = make_model(tmp_path / name, tiny_model, vocabulary=vocabulary)
        for file in folder.glob("tokenizer*"):
            file.unlink()
    words = [word for word in words_of(tiny_model, chat_file, "x") if not word.startswith("teacher")] + ["max_steps=1"]
    with pytest.raises(UserError, match="embeddings have 320 and 328 rows"):
        run(load_config(*words, f"teacher.model={tmp_path / 'other'}", f"output_dir={tmp_path / 'a'}"))
    run(load_config(*words, f"teacher.model={tmp_path / 'same'}", f"output_dir={tmp_path / 'b'}"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["teacher.cache_top_k=8", "dataset.streaming=true"], "`teacher.cache_top_k` can't be combined with `dataset.streaming"),
        (["teacher.cache_top_k=0"], "in `teacher`, `cache_top_k` must be at least 1"),
        (["kd_ratio=1.5"], "`kd_ratio` must be between 0 and 1"),
        (["divergence.type=jsd", "divergence.beta=1.0"], "its ends are `type: forward_kl` and `type: reverse_kl`"),
        (["divergence.temperature=0.0"], "in `divergence`, `temperature` must be above 0"),
        (["divergence.type=wasserstein"], "wasserstein"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("distill", "model=x", "teacher.model=y", "dataset.source=z", *more)


def test_what_is_wrong_with_a_teacher_is_told_before_anything_is_loaded(tmp_path, tiny_model, chat_file):
    from tunesmith.training.preflight import check

    for name, sentence in (
        (tmp_path / "none", "there is no folder"),
        (chat_file, "is a file"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(ConfigError, match=f"(teacher.model.*)?{sentence}"):
            check(load_config(*words_of(tiny_model, chat_file, name), f"output_dir={tmp_path / 'run'}"))
    teacher = make_model(tmp_path / "teacher", tiny_model, layers=3)
    words = [*words_of(tiny_model, chat_file, teacher), f"output_dir={tmp_path / 'run'}", "tensor_parallel_dim=4"]
    with pytest.raises(ConfigError, match="`teacher.model`: `tensor_parallel_dim: 4` does not divide"):
        check(load_config(*words), processes=4)


# --- answers of its own -------------------------------------------------------------------------------

OWN = ["on_policy_ratio=0.5", "sampling.max_new_tokens=12", "sampling.batch_size=5", "dataset.packed=false"]


@pytest.mark.parametrize(
    ("layout", "weights"),
    [("one", "full"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("dp2", "full"), ("dp2", "qlora"), ("hsdp", "lora"), ("tp2", "full"), ("cp2", "dora"), ("dp2 x tp2", "full")))],
)  # fmt: skip
def test_own_answers_are_the_same_on_every_layout(layout, weights, teachers, tmp_path, tiny_model, chat_file):
    words = [*words_of(tiny_model, chat_file, teachers["tied"], weights), *OWN, "max_steps=4"]
    expected = train([*words, "batch_size=8"], tmp_path / "one")
    assert_same(train([*words, "batch_size=2", "batch_size_val=8"], tmp_path / "run", layout), expected)
    assert {"ce_loss" in step for step in expected[0] if "loss" in step} == {True, False}, "some steps of both kinds"


def test_a_resume_writes_the_same_answers(teachers, tmp_path, tiny_model, chat_file):
    words = [*words_of(tiny_model, chat_file, teachers["plain"]), *OWN, "on_policy_ratio=1.0", "batch_size=4"]
    through = train(words, tmp_path / "through")
    for steps in (1, 3):
        found = train([*words, f"max_steps={steps}", "resume_from_checkpoint=true"], tmp_path / "run")
    assert found[1].keys() == through[1].keys() and all(
        torch.equal(found[1][name], t) for name, t in through[1].items()
    )


def test_own_answers_follow_the_prompts_of_their_rows(tiny_model):
    """The prompt is all before the last answer; what is written is what the model says to it, and alone has labels."""
    import tunesmith
    from tunesmith.data.collate import EMPTY_ROW, TokenRow, collate
    from tunesmith.generation.own_answers import OwnAnswers
    from tunesmith.generation.sampling import Sampling
    from tunesmith.parallel.mesh import start_mesh

    model, tokenizer = tunesmith.load_model(tiny_model), tunesmith.load_tokenizer(tiny_model)
    ids = np.arange(10, 30)
    labels = np.full(20, -100)
    labels[3:6], labels[11:14] = ids[4:7], ids[12:15]
    rows = [TokenRow(ids, labels, np.array([20])), EMPTY_ROW]
    batch = collate(rows, tokenizer.pad_id, False, 64)
    writer = OwnAnswers(tokenizer, start_mesh(torch.device("cpu")), 1.0, Sampling(max_new_tokens=9), 4, 18, 0)
    [made] = writer.of(model, [batch], 1)
    said = tunesmith.generation.completions.generate_completions(
        model, tokenizer, [ids[:12].tolist()], Sampling(max_new_tokens=9)
    )[0].ids
    whole = [*range(10, 22), *said]
    assert made.input_ids[0, :18].tolist() == whole[:18] and len(whole) > 19
    assert made.labels[0, :18].tolist() == [-100] * 11 + whole[12:19]
    assert (made.labels[1] == -100).all() and made.counts == {"tokens": 7, "own_answers": 1}
    assert writer.of(model, [batch], 1)[0].input_ids.equal(made.input_ids)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["teacher.cache_top_k=8"], "can't be combined with `teacher.cache_top_k`"),
        (["pipeline_parallel_dim=2", "gradient_accumulation_steps=2"], "can't be combined with `pipeline_parallel_dim: 2`"),
        (["dataset.packed=true"], "can't be combined with `dataset.packed: true`"),
        (["dataset.train_on_input=true"], "can't be combined with `dataset.train_on_input: true`"),
        (["sampling.top_p=2.0"], "`top_p` must be above 0 and at most 1"),
    ],
)  # fmt: skip
def test_where_a_student_can_not_write(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config("distill", "model=x", "teacher.model=y", "dataset.source=z", "on_policy_ratio=0.5", *more)
