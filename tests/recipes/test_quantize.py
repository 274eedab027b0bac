"""`tune run quantize` from the command line to a repository that is generated from, evaluated and trained on."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tunesmith
from tests.distributed import run_distributed
from tests.recipes.test_qat import losses_of, newest, run_recipe
from tunesmith.config import load_config, run
from tunesmith.errors import ConfigError, UserError
from tunesmith.eval.perplexity import perplexity
from tunesmith.nn.lora import apply_lora, merge_lora, reset_adapters
from tunesmith.nn.quantize import NF4Linear
from tunesmith.nn.rounding import linear_layers, rounded
from tunesmith.nn.scheme import KINDS, Scheme

TEXT = "the quick brown fox jumps over the lazy dog. the answer to the question is the lazy fox. " * 40


def quantize(model, folder, *more):
    run(load_config("quantize", f"model={model}", f"output_dir={folder}", "device=cpu", *more))
    return tunesmith.load_model(folder)


def ids(vocabulary=320):
    return torch.randint(1, vocabulary, (2, 24), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model.logits(ids())


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


# --- what is written and said --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme_from_one_end_to_the_other(tmp_path, tiny_model, text, capsys, kind):
    ours = quantize(tiny_model, tmp_path / "out", f"scheme.type={kind}", f"perplexity.files={text}")
    said = capsys.readouterr().out
    plain, tokenizer = tunesmith.load_model(tiny_model), tunesmith.load_tokenizer(tiny_model)
    expected = logits(plain)
    with rounded(plain, Scheme(kind)):
        assert difference(logits(ours), logits(plain)) < 1e-6
        after = perplexity(plain, tokenizer, [TEXT], 512).perplexity
    before = perplexity(plain, tokenizer, [TEXT], 512).perplexity
    told = re.search(r"perplexity: (\S+) before, (\S+) after", said)
    assert told and math.isclose(float(told[1]), before, rel_tol=1e-3)
    assert math.isclose(float(told[2]), after, rel_tol=1e-3) and before != after
    assert 1e-4 < difference(logits(ours), expected) < 0.3
    files = load_file(tmp_path / "out" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in files.values())
    assert f"{size / 1e6:.3g} MB instead of" in said
    dense = sum(layer.in_features * layer.out_features for layer in linear_layers(plain).values())
    held = sum(tensor.nbytes for name, tensor in files.items() if "_proj" in name)
    assert f"{held / dense:.3f} bytes" in said and held / dense < (0.6 if kind == "nf4" else 1.3)
    assert "left as they are: lm_head\n" in said and "read back: the logits differ by" in said
    assert tunesmith.load_tokenizer(tmp_path / "out").encode("the fox") == tokenizer.encode("the fox")


def test_generation_from_the_command_line(tmp_path, tiny_model, capsys):
    ours = quantize(tiny_model, tmp_path / "out", "scheme.type=nf4")
    words = ["generate", f"model={tmp_path / 'out'}", "prompt=the quick", "chat=false", "temperature=0"]
    capsys.readouterr()
    run(load_config(*words, "max_new_tokens=6", "dtype=fp32", "device=cpu"))
    tokenizer = tunesmith.load_tokenizer(tiny_model)
    said = capsys.readouterr().out
    assert tunesmith.generate(ours, tokenizer, ["the quick"], max_new_tokens=6)[0] in said


@pytest.mark.parametrize("kind", ["int4_weight_only", "nf4"])
def test_an_adapter_is_merged_first(tmp_path, tiny_model, kind):
    model = tunesmith.load_model(tiny_model)
    apply_lora(model, rank=4)
    reset_adapters(model, 0)
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    from tunesmith.checkpoint.adapter import save_adapter

    save_adapter(model, tmp_path / "adapter", str(tiny_model))
    ours = quantize(tmp_path / "adapter", tmp_path / "out", f"scheme.type={kind}")
    merge_lora(model)
    with rounded(model, Scheme(kind)):
        assert difference(logits(ours), logits(model)) < 1e-6


def test_number_type_and_shards(tmp_path, tiny_model):
    ours = quantize(tiny_model, tmp_path / "out", "scheme.type=int8_weight_only", "dtype=bf16", "max_shard_size=60KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert ours.model.weight_dtype == torch.bfloat16
    with rounded(plain := tunesmith.load_model(tiny_model, dtype="bfloat16"), Scheme("int8_weight_only")):
        assert torch.equal(logits(ours), logits(plain))


# --- GPTQ ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gptq_loses_less_than_rounding_to_nearest(tmp_path, assets, capsys):
    """A real model, on stories that the calibration has not seen."""
    rows = (assets / "data" / "tinystories" / "train_head.jsonl").read_text().splitlines()
    (tmp_path / "seen.jsonl").write_text("\n".join(rows[:200]))
    (tmp_path / "unseen.jsonl").write_text("\n".join(rows[-60:]))
    words = ["scheme.type=int4_weight_only", "scheme.group_size=64", "scheme.skip_indivisible=true"]
    words += [f"perplexity.files={tmp_path / 'unseen.jsonl'}"]
    gptq = ["calibration.method=gptq", f"calibration.data={tmp_path / 'seen.jsonl'}", "calibration.num_samples=64"]
    found = {}
    for name, more in {"nearest": [], "gptq": [*gptq, "calibration.max_seq_len=256"]}.items():
        quantize(assets / "models" / "stories260K", tmp_path / name, *words, *more)
        before, after = re.search(r"perplexity: (\S+) before, (\S+) after", capsys.readouterr().out).groups()
        found[name] = float(after) - float(before)
    assert 0 < found["gptq"] < 0.7 * found["nearest"]


def test_transformers_reads_what_gptq_chose(tmp_path, tiny_model, text):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao")
    more = ["calibration.method=gptq", f"calibration.data={text}", "calibration.num_samples=4"]
    ours = quantize(tiny_model, tmp_path / "out", "scheme.type=int4_weight_only", *more, "calibration.max_seq_len=64")
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert difference(theirs(ids()).logits, logits(ours)) < 1e-5
    with rounded(plain := tunesmith.load_model(tiny_model), Scheme("int4_weight_only")):
        assert difference(logits(ours), logits(plain)) > 1e-3


# --- training on it ------------------------------------------------------------------------------


def test_adapters_are_trained_on_nf4_as_on_the_dense_numbers(tmp_path, tiny_model, chat_file):
    """QLoRA on a quantized repository, on one and on two processes; and the adapter is read back on it."""
    ours = quantize(tiny_model, tmp_path / "nf4", "scheme.type=nf4")
    shutil.copytree(tiny_model, tmp_path / "dense")
    dense = tunesmith.load_model(tiny_model)
    with torch.no_grad():
        for name, layer in linear_layers(ours).items():
            assert isinstance(layer, NF4Linear)
            dense.get_submodule(name).weight.copy_(layer.weight)
    tunesmith.save_model(dense, tmp_path / "dense")
    words = ["sft", "+lora", "dtype=fp32", "device=cpu", "max_steps=4", "global_batch_size=4", "optimizer.lr=0.01"]
    words += [f"dataset.source={chat_file}", "tokenizer.max_seq_len=64", "weights.target_modules=[q_proj,down_proj]"]
    losses = {}
    for name in ("nf4", "dense"):
        run(load_config(*words, f"model={tmp_path / name}", f"output_dir={tmp_path / name}_run"))
        losses[name] = losses_of(tmp_path / f"{name}_run")
    run_distributed(run_recipe, 2, [*words, f"model={tmp_path / 'nf4'}"], tmp_path / "two")
    losses["two"] = losses_of(tmp_path / "two")
    for found in (losses["nf4"], losses["two"]):
        for (loss, norm), (other, theirs) in zip(found, losses["dense"], strict=True):
            assert math.isclose(loss, other, rel_tol=1e-4) and math.isclose(norm, theirs, rel_tol=1e-3)
    assert losses["nf4"][-1][0] < losses["nf4"][0][0]
    trained = tunesmith.load_model(newest(tmp_path / "nf4_run"))
    assert difference(logits(trained), logits(tunesmith.load_model(newest(tmp_path / "dense_run")))) < 1e-3
    assert difference(logits(trained), logits(ours)) > 1e-3


# --- mistakes ------------------------------------------------------------------------------------


def refused(error, sentence, *words):
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        run(load_config("quantize", "device=cpu", *words))
    return str(caught.value)


def test_mistakes_are_told_before_weights_are_read(tmp_path, tiny_model, text):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    into, model = f"output_dir={tmp_path / 'out'}", f"model={broken}"
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"intermediate_size": 120}))
    said = refused(
        ConfigError,
        "`scheme.group_size` = 32 does not divide the inputs of model.layers.*.mlp.down_proj (120)",
        into,
        model,
    )
    assert "take 8, or another divisor of 8" in said and "`scheme.skip_indivisible: true`" in said
    said = refused(ConfigError, "has blocks of 64, which do not divide the inputs of", into, model, "scheme.type=nf4")
    assert "down_proj (120)" in said
    quantized = Scheme("nf4").to_config(["lm_head"])
    (broken / "config.json").write_text(json.dumps(content | {"quantization_config": quantized}))
    refused(ConfigError, "is quantized already: name the model that it was made from", into, model)
    model = f"model={tiny_model}"
    refused(
        ConfigError, "`perplexity.files`: there is no file nowhere.txt", into, model, "perplexity.files=nowhere.txt"
    )
    refused(ConfigError, "is not empty", f"output_dir={broken}", model)
    gptq = [into, model, "calibration.method=gptq"]
    refused(ConfigError, "needs text: name files in `data`", *gptq)
    gptq += [f"calibration.data={text}"]
    refused(ConfigError, "chooses whole numbers, and `scheme.type: nf4` has none", *gptq, "scheme.type=nf4")
    refused(ConfigError, "is more than the 512 tokens that the model", *gptq, "calibration.max_seq_len=600")
    refused(
        ConfigError,
        "has no effect with `type: float8_dynamic`",
        into,
        model,
        "scheme.type=float8_dynamic",
        "scheme.group_size=32",
    )
    assert "int8_dynamic" in refused(ConfigError, "scheme.type", into, model, "scheme.type=int3")
    (tmp_path / "blank.txt").write_text("\n")
    blank = [into, model, "calibration.method=gptq", f"calibration.data={tmp_path / 'blank.txt'}"]
    refused(UserError, "`calibration.data`: ", *blank)
    said = refused(UserError, "and 128 samples of 512 need 65536: give more text", *gptq)
    assert re.search(r"take `calibration.num_samples=\d+`", said)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_where_other_numbers_are_read_back_nothing_is_left(tmp_path, tiny_model, monkeypatch):
    from tunesmith.recipes import quantize as recipe

    monkeypatch.setattr(recipe, "logits_from_files", lambda folder, device: torch.randn(1, 24, 320))
    refused(
        UserError,
        "gives other logits than the model in memory",
        f"output_dir={tmp_path / 'out'}",
        f"model={tiny_model}",
    )
    assert not list(tmp_path.iterdir())
