"""Export end to end: adapters merged, number types and shards changed, mistakes refused; transformers and PEFT agree with the result."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.check import probe_ids
from tunesmith.config import load_config
from tunesmith.config import run as run_config
from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.nn.lora import adapter_state, apply_lora, reset_adapters
from tunesmith.nn.scheme import Scheme
from tunesmith.recipes import export
from tunesmith.training import preflight
from tunesmith.training.convert import replacing
from tunesmith.training.load import load_model

SCHEME = {"export": [], "quantize": ["scheme.type=int8_weight_only", "device=cpu"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3])
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"from": "base"}')
    return folder


def make_adapter(base: Path, folder: Path, size: float = 0.1, quantize_base: str | None = None, **options) -> Path:
    model = load_model(base)
    apply_lora(model, quantize_base=quantize_base, **options)
    reset_adapters(model, 0)
    for tensor in adapter_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=size)
    save_adapter(model, folder, str(base))
    return folder


def run(model: Path, output: Path, **options) -> None:
    export.main(Export(model=str(model), output_dir=str(output), device="cpu", **options))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(probe_ids(96)).logits.float()


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantize_base", [None, "nf4"])
def test_adapter_is_merged_into_the_unquantized_base(base, tmp_path, capsys, use_dora, quantize_base):
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=use_dora, quantize_base=quantize_base)
    run(adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert_close(logits(merged), logits(expected))
    assert merged.generation_config.eos_token_id == [2, 3]
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"from": "base"}'
    assert not list(tmp_path.glob(".*partial"))
    printed = capsys.readouterr().out
    assert re.search(r"wrote .*: \d+ files, \d[\d.]* MB", printed)
    assert "14 adapter layers of" in printed and "largest difference of the logits" in printed


def test_tokenizer_saved_with_the_adapter_is_preferred(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    run(adapter, tmp_path / "without")  # a setting without a tokenizer is none
    assert (tmp_path / "without" / "tokenizer_config.json").read_text() == '{"from": "base"}'
    assert (tmp_path / "without" / "tokenizer.json").is_file()
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("template")
    run(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"from": "adapter"}'
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template"


def test_every_file_of_a_tokenizer_comes_along(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    for name in ("qwen.tiktoken", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    run(tmp_path / "model", tmp_path / "out")
    for name in ("qwen.tiktoken", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "out" / name).read_text() == name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_number_type_and_shards(base, tmp_path, dtype):
    run(base, tmp_path / "out", dtype=dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == wanted
    assert_close(
        logits(theirs.float()), logits(AutoModelForCausalLM.from_pretrained(base)), 1e-5 if dtype == "fp32" else 3e-2
    )


def test_bfloat16_base_takes_the_adapter_in_float32(base, tmp_path):
    run(base, tmp_path / "base16", dtype="bf16")
    adapter = make_adapter(base, tmp_path / "adapter")
    run(adapter, tmp_path / "out", base=str(tmp_path / "base16"), dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    expected = load_model(tmp_path / "base16", dtype="float32", adapter=adapter)
    torch.testing.assert_close(
        merged[f"{name}.weight"], expected.get_submodule(name).merged_weight(), rtol=1e-6, atol=1e-7
    )


def test_adapter_that_changes_nothing(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", size=0)
    with pytest.raises(UserError, match="the adapter changes nothing"):
        run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_difference_above_the_tolerance(base, tmp_path):
    with pytest.raises(UserError, match="the logits differ from the model's by"):
        run(base, tmp_path / "out", dtype="bf16", tolerance=1e-6)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_full_folders_are_refused_and_empty_ones_taken(base, tmp_path):
    (tmp_path / "out").mkdir()
    run(base, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="output_dir .*out is not empty"):
        run(base, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("recipe", ["export", "quantize"])
def test_folders_that_cant_be_written(base, tmp_path, monkeypatch, recipe):
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    for folder, message in [
        (".", "is the current folder"),
        ("../file/out", "can't be written to"),
        ("/proc/out", "can't be written"),
    ]:
        with pytest.raises(UserError, match=message):
            preflight.check(config := load_config(recipe, f"model={base}", f"output_dir={folder}", *SCHEME[recipe]))
            run_config(config)
    run_config(load_config(recipe, f"model={base}", "output_dir=~/out", *SCHEME[recipe]))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "here", "out"} and not list(
        (tmp_path / "here").iterdir()
    )


def test_what_came_meanwhile_is_left(tmp_path):
    with pytest.raises(UserError, match="out can't be written"), replacing(tmp_path / "out", only_empty=True):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]


def test_mistakes(base, tmp_path):
    with pytest.raises(UserError, match="`base` is for adapters"):
        run(base, tmp_path / "out", base=str(base))
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="doesn't name its base: set `base`"):
        run(adapter, tmp_path / "out")
    run(adapter, tmp_path / "out", base=str(base))
    with pytest.raises(UserError, match="`base`: there is no folder nowhere"):
        preflight.check(Export(model=str(adapter), base="nowhere", output_dir=str(tmp_path / "absent")))
    shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = Scheme("int4_weight_only", 32).to_config([])
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized and can't be exported as safetensors: export the model that it"):
        run(tmp_path / "quantized", tmp_path / "other")


WRONG = [
    ("model", ["base=model"], "`base` is for adapters, but .*model is no adapter"),
    ("model", ["format=adapter"], "`format: adapter` writes an adapter, and .*model is none"),
    ("model", ["format=gguf", "gguf.lora=true"], "`gguf.lora` writes an adapter, and .*model is none"),
    ("adapter", ["format=gguf", "gguf.lora=true", "gguf.type=q4_0"], "an adapter is not rounded to q4_0"),
    ("model", ["max_shard_size=0GB"], "`max_shard_size` must be a size"),
    ("model", ["format=onnx", "program.max_length=65"], "`program.max_length` is 65, more than the context"),
    ("model", ["format=torch_export", "program.max_chunk=65"], "`program.max_chunk` is 65, more than the sequence"),
    ("quantized", [], "is quantized and can't be exported as safetensors"),
    ("quantized", ["format=gguf"], "is quantized and can't be exported as GGUF"),
    ("quantized", ["format=executorch"], "is quantized in a way that ExecuTorch doesn't compute with"),
    ("scorer", ["format=gguf"], "to be exported as GGUF, is a reward model or classifier"),
    ("scorer", ["format=onnx"], "to be exported as onnx, is a reward model or classifier"),
    ("scoring", ["format=torch_export"], "to be exported as torch_export, is a reward model or classifier"),
]


@pytest.fixture(scope="module")
def several(base, tmp_path_factory):
    """A model, its adapter, an adapter that scores, the model quantized, and a model that scores; only config.json tells."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(base, folder / "model")
    make_adapter(folder / "model", folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "scoring")
    for name in ("quantized", "scorer"):
        shutil.copytree(folder / "model", folder / name)
    content = {
        "quantized": {"quantization_config": Scheme("int4_weight_only", 32).to_config([])},
        "scorer": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1},
    }
    for name, more in content.items():
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | more))
    config = json.loads((folder / "scoring" / "adapter_config.json").read_text())
    (folder / "scoring" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    return folder


@pytest.mark.parametrize("name, words, said", WRONG)
def test_what_a_run_refuses_at_once_is_told_by_validate(several, monkeypatch, tmp_path, name, words, said):
    monkeypatch.chdir(several)
    with pytest.raises(UserError, match=said):
        preflight.check(load_config("export", f"model={name}", f"output_dir={tmp_path / 'out'}", *words))


def test_missing_packages_are_told_by_validate(several, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    config = load_config("export", f"model={several / 'model'}", f"output_dir={tmp_path / 'out'}", "format=onnx")
    with pytest.raises(UserError, match="needs the package onnxscript, .*'tunesmith\\[onnx\\]'"):
        preflight.check(config)


def test_real_model(assets, tmp_path):
    adapter = make_adapter(assets / "models" / "stories260K", tmp_path / "adapter", size=0.02, quantize_base="nf4")
    run(adapter, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = load_model(tmp_path / "adapter")
    ids = probe_ids(512)
    with torch.no_grad():
        assert_close(ours.logits(ids), theirs(ids).logits)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        assets / "models" / "stories260K" / "tokenizer.json"
    ).read_bytes()
