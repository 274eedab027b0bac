"""Preference tuning: the same update for every cut of the batch, on every layout, packed or not; what is learned; what is refused."""

import json
import math

import pytest
import torch

from tests.runs import COMMON, assert_same, train
from tunesmith.config import load_config, run
from tunesmith.configs.preference import PreferenceLoss
from tunesmith.errors import ConfigError, UserError
from tunesmith.losses import preference as losses
from tunesmith.nn.scheme import Scheme

WEIGHTS = {"full": [], "lora": ["+lora"], "dora": ["+dora"], "qlora": ["+qlora"]}
PAIRED = ("dpo", "robust", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "cpo", "orpo")
UNPAIRED = ("kto", "bco")
WORDS = "the quick brown fox jumps over lazy dog".split()


def said(start, count):
    return " ".join(WORDS[(start + 3 * j) % 8] for j in range(count))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """20 pairs of different lengths; preferred answers end with a word that rejected ones never have."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": said(i, 1 + i % 6),
            "chosen": said(i + 1, 1 + i % 5) + " fox",
            "rejected": said(i + 2, 1 + (2 * i) % 7) + " dog",
        }
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def marked_file(tmp_path_factory):
    """The same answers, each by itself, marked good or bad."""
    path = tmp_path_factory.mktemp("marked") / "marked.jsonl"
    rows = [
        {
            "prompt": said(i // 2, 1 + i % 6),
            "completion": said(i, 1 + i % 5) + (" fox" if i % 2 else " dog"),
            "label": bool(i % 2),
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def words_for(tiny_model, pairs_file, marked_file):
    def words(loss, weights="full", *more):
        data = pairs_file if loss in PAIRED else marked_file
        return ["preference", *WEIGHTS[weights], *COMMON, f"model={tiny_model}", f"dataset.source={data}", f"loss.type={loss}", *more]  # fmt: skip

    return words


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- cuts, packing, layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*PAIRED, *UNPAIRED])
def test_packing_and_micro_batches_change_no_number(loss, words_for, tmp_path):
    """Packed units are drawn into other steps, so one step takes all of them."""
    words = words_for(loss, "full", "global_batch_size=32", "max_steps=2", "shuffle=false", "loss.sft_weight=0.5")
    one = train([*words, "batch_size=16"], tmp_path / "one")
    assert_same(train([*words, "batch_size=2"], tmp_path / "small"), one)
    packed = train([*words, "batch_size=16", "dataset.packed=true"], tmp_path / "packed")
    assert_same(packed, one)


def test_packed_rows_hold_several_pairs(words_for, tmp_path):
    train(words_for("dpo", "full", "dataset.packed=true", "batch_size=2"), tmp_path / "run")
    [source] = json.loads((tmp_path / "run" / "data_report.json").read_text())["sources"]
    assert source["training_rows"] < 20


SOME = [
    ("dp2", "dpo", "full", 2),
    ("dp2", "kto", "lora", 1),
    ("tp2", "dpo", "lora", 4),
    ("tp2", "orpo", "full", 2),
    ("pp2", "dpo", "full", 2),
    ("pp2", "kto", "lora", 2),
    ("cp2", "dpo", "full", 2),
    ("cp2", "bco", "full", 4),
]
ALL = [
    (layout, loss, weights, batch_size)
    for layout in ("dp2", "tp2", "pp2", "cp2")
    for loss in ("dpo", "simpo", "orpo", "kto", "bco")
    for weights in ("full", "lora", "qlora")
    for batch_size in (2,)
    if (layout, loss, weights, batch_size) not in SOME and not (weights == "qlora" and "tp2" in layout)
]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    done = {}

    def result(words):
        key = " ".join(words)
        if key not in done:
            done[key] = train([*words, "batch_size=4"], tmp_path_factory.mktemp("one") / "run")
        return done[key]

    return result


@pytest.mark.parametrize(
    ("layout", "loss", "weights", "batch_size"),
    [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
)
def test_the_layout_changes_no_number(layout, loss, weights, batch_size, words_for, on_one, tmp_path):
    words = words_for(loss, weights)
    assert_same(train([*words, f"batch_size={batch_size}"], tmp_path / "run", layout), on_one(words))


# --- the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("weights", ["full", "lora", "qlora"])
def test_log_probs_computed_once_are_those_of_the_reference(
    loss, weights, words_for, tmp_path, pairs_file, marked_file
):
    held_out = f"dataset_val.source={pairs_file if loss == 'dpo' else marked_file}"
    words = words_for(loss, weights, "batch_size=4", held_out)
    live = train(words, tmp_path / "live")
    assert_same(train([*words, "reference.precompute=true"], tmp_path / "once"), live)
    assert_same(train([*words, "reference.precompute=true"], tmp_path / "again"), live)  # from the cache
    validated = [
        [row["val_loss"] for row in metrics(tmp_path / name) if "val_loss" in row] for name in ("live", "once")
    ]
    assert validated[0] == pytest.approx(validated[1], rel=1e-5) and len(validated[0]) == 1


def test_log_probs_computed_once_on_several_ranks(words_for, tmp_path):
    words = words_for("dpo", "full", "batch_size=2")
    expected = train(words, tmp_path / "live")
    assert_same(train([*words, "reference.precompute=true"], tmp_path / "once", "dp2"), expected)


def test_the_first_step_finds_no_difference_to_the_reference(words_for, tmp_path):
    train(words_for("dpo", "full", "batch_size=4"), tmp_path / "run")
    first = metrics(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_another_reference_is_compared_with(words_for, tmp_path, tiny_model):
    trained = tmp_path / "trained"
    train(words_for("dpo", "full", "batch_size=4"), trained)
    train(
        words_for("dpo", "full", "batch_size=4", f"reference.model={trained / 'checkpoints' / 'latest'}"),
        tmp_path / "run",
    )
    assert metrics(tmp_path / "run")[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


# --- resume, learning, export ------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "weights"), [("dpo", "full"), ("kto", "lora"), ("bco", "full")])
def test_stop_and_resume_equal_never_stopped(loss, weights, words_for, tmp_path):
    words = words_for(loss, weights, "optimizer.type=adamw", "optimizer.lr=1e-3", "batch_size=2")
    whole = train(words, tmp_path / "whole")
    train([*words, "max_steps=2"], tmp_path / "parts")
    parts = train([*words, "resume_from_checkpoint=true"], tmp_path / "parts")
    assert parts[0] == whole[0]
    assert all(torch.equal(parts[1][name], tensor) for name, tensor in whole[1].items())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "kto", "bco"])
def test_margins_rise_on_held_out_answers(loss, tiny_model, pairs_file, tmp_path):
    """Preferred answers end with another word than rejected ones, which the held-out pairs show too."""
    words = f"""preference model={tiny_model} loss.type={loss} dataset.source={pairs_file} dataset.split=train[:14]
        dataset_val.source={pairs_file} dataset_val.split=train[14:] dtype=fp32 device=cpu tokenizer.max_seq_len=64 epochs=8
        batch_size=7 optimizer.lr=1e-3 run_val_every_n_steps=4 seed=1""".split()
    run(load_config(*words, f"output_dir={tmp_path / 'run'}"))
    rows = [row for row in metrics(tmp_path / "run") if "val_loss" in row]
    margins = [row["val_rewards/chosen"] - row["val_rewards/rejected"] for row in rows]
    assert margins[-1] > max(0.0, margins[0])


def test_options_and_losses_agree():
    import typing

    for section in typing.get_args(PreferenceLoss):
        entry = {**losses.PAIRED, **losses.UNPAIRED}[section.type]
        assert (section.type in losses.PAIRED) == section.needs_pairs
        assert entry.needs_reference == section.needs_reference
        assert getattr(entry, "needs_sft_term", False) == (section().sft_weight > 0)


# --- mistakes ----------------------------------------------------------------------------------------


def refused(*words):
    with pytest.raises(UserError) as error:
        run(load_config("preference", *words))
    return str(error.value)


def test_a_reference_of_another_kind_is_refused_before_weights_are_read(tiny_model, pairs_file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    numbers = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 3}
    (other / "config.json").write_text(json.dumps(numbers))
    (other / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    text = refused(f"model={tiny_model}", f"dataset.source={pairs_file}", f"reference.model={other}", f"output_dir={tmp_path / 'run'}")  # fmt: skip
    assert "its num_hidden_layers is 3 instead of 2" in text and "reference.model" in text


def test_options_without_effect_are_refused(tiny_model, pairs_file):
    words = [f"model={tiny_model}", f"dataset.source={pairs_file}"]
    with pytest.raises(ConfigError, match="compares with no reference"):
        load_config("preference", *words, "loss.type=simpo", "reference.precompute=true")
    with pytest.raises(ConfigError, match=r"reference\.quantize.*adapters"):
        load_config("preference", "+lora", *words, "reference.quantize=nf4")


def test_pairs_are_needed_where_the_loss_compares_two(tiny_model, marked_file, tmp_path):
    text = refused(f"model={tiny_model}", f"dataset.source={marked_file}", f"output_dir={tmp_path / 'run'}")
    assert "kto" in text and "half of no pair" in text


def test_pairs_may_be_taken_apart(tiny_model, pairs_file, tmp_path):
    words = [
        "preference",
        *COMMON,
        f"model={tiny_model}",
        f"dataset.source={pairs_file}",
        "loss.type=kto",
        "batch_size=4",
    ]
    train(words, tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["kl"] >= 0


def test_what_is_compared_with_must_not_change_on_a_resume(words_for, tmp_path, tiny_model):
    words = words_for("dpo", "full", "batch_size=4")
    train([*words, "max_steps=2"], tmp_path / "run")
    for change, sentence in (
        ("loss.type=ipo", "loss was dpo, is now ipo"),
        ("reference.quantize=nf4", "the reference changed"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(load_config(*words, change, "resume_from_checkpoint=true", f"output_dir={tmp_path / 'run'}"))


def test_another_vocabulary_or_rounded_weights_are_no_reference(tiny_model, pairs_file, tmp_path):
    import shutil

    from tunesmith.training.preflight import check

    other = shutil.copytree(tiny_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    rounded = shutil.copytree(tiny_model, tmp_path / "rounded")
    numbers = json.loads((rounded / "config.json").read_text())
    numbers["quantization_config"] = Scheme("int4_weight_only", 32).to_config([])
    (rounded / "config.json").write_text(json.dumps(numbers))
    for folder, sentence in ((other, "another vocabulary"), (rounded, "is quantized: name the model it was made from")):
        config = load_config("preference", f"model={tiny_model}", f"dataset.source={pairs_file}", f"reference.model={folder}", f"output_dir={tmp_path / 'run'}")  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            check(config)


def test_another_model_finds_no_log_probs_of_the_first(words_for, tiny_model, tmp_path):
    """They differ in one matrix in the middle of a file."""
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= -1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = words_for("dpo", "full", "batch_size=4", "reference.precompute=true", f"reference.model={tiny_model}")
    train(words, tmp_path / "first")
    expected = train([*words_for("dpo", "full", "batch_size=4"), f"reference.model={other}"], tmp_path / "live")
    assert_same(train([*words, f"reference.model={other}"], tmp_path / "second"), expected)


def test_validation_does_not_depend_on_how_it_is_cut(words_for, marked_file, tmp_path):
    words = words_for("kto", "full", "batch_size=4", f"dataset_val.source={marked_file}", "optimizer.lr=0.5")
    losses = []
    for size in (1, 3, 24):
        train([*words, f"batch_size_val={size}"], tmp_path / str(size))
        losses.append(metrics(tmp_path / str(size))[-1]["val_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_answers_to_one_prompt_have_no_others_to_compare_with(tiny_model, tmp_path):
    path = tmp_path / "one.jsonl"
    rows = [{"prompt": "the", "completion": said(i, 3), "label": bool(i % 2)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refused(f"model={tiny_model}", f"dataset.source={path}", "loss.type=kto", f"output_dir={tmp_path / 'run'}")
    assert "all rows have the same prompt" in text
