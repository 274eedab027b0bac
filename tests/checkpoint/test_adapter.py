"""Adapters in and out: PEFT is the other side, on the same tiny Llama."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunesmith.checkpoint import adapter, hf
from tunesmith.checkpoint.adapter import (
    apply_adapter,
    check_changes_something,
    check_saved_adapter,
    load_adapter,
    save_adapter,
)
from tunesmith.checkpoint.adapter_config import lora_options, read_adapter_config
from tunesmith.checkpoint.check import probe_ids, probe_logits
from tunesmith.checkpoint.hf import load_weights, verify
from tunesmith.errors import UserError
from tunesmith.models.decoder import build
from tunesmith.nn.lora import adapter_layers, adapter_state, apply_lora, freeze_base, reset_adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def on_meta(base: Path):
    with torch.device("meta"):
        return build(*hf.read_model_config(base)[:2], hf.read_model_config(base)[2])


def loaded(base: Path, folder: Path | None = None, **options):
    """The base with an adapter: the one in `folder`, or a fresh one."""
    model = on_meta(base)
    if folder is not None:
        apply_adapter(model, folder, **options)
    else:
        apply_lora(model, **options)
    load_weights(model, base)
    reset_adapters(model, 0)
    if folder is not None:
        load_adapter(model, folder)
    return model.eval()


def randomise(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def peft_model(base: Path, **options):
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    randomise(parameter for _, parameter in model.named_parameters() if parameter.requires_grad)
    return model.eval()


def peft_logits(model):
    with torch.no_grad():
        return model(probe_ids(96)).logits


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


KINDS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "head": {"r": 2, "target_modules": ["lm_head", "o_proj"]},
    "head-dora": {"r": 2, "target_modules": ["lm_head", "o_proj"], "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 3},
        "alpha_pattern": {"^model.layers.1.self_attn.k_proj": 32},
    },
    "layers_to_transform": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "exclude_modules": {
        "r": 2,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["model.layers.0.mlp.up_proj"],
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_peft_wrote(base, tmp_path, kind):
    theirs = peft_model(base, **KINDS[kind])
    theirs.save_pretrained(tmp_path)
    ours = loaded(base, tmp_path)
    assert_close(probe_logits(ours), peft_logits(theirs))
    with pytest.raises(AssertionError):
        assert_close(probe_logits(ours), peft_logits(theirs.base_model.disable_adapter_layers() or theirs), 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_wrote(base, tmp_path, kind):
    theirs = peft_model(base, **KINDS[kind])
    theirs.save_pretrained(tmp_path / "peft")
    ours = loaded(base, tmp_path / "peft")
    digests = save_adapter(ours, tmp_path / "ours", str(base))
    verify(tmp_path / "ours", digests)
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "ours").iterdir())
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours").eval()
    assert_close(peft_logits(again), peft_logits(theirs))
    ours_names, theirs_names = (
        load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("ours", "peft")
    )
    assert set(ours_names) == {name for name in theirs_names if "base_layer" not in name}
    assert torch.equal(probe_logits(loaded(base, tmp_path / "ours")), probe_logits(ours))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "dora", "all-linear", "head"])
def test_every_gradient_equals_peft(base, tmp_path, kind):
    theirs = peft_model(base, **KINDS[kind])
    theirs.save_pretrained(tmp_path)
    ours = loaded(base, tmp_path)
    freeze_base(ours)
    ids = probe_ids(96)
    theirs(ids, labels=ids).loss.backward()
    (ours.lm_head.cross_entropy(ours(ids)[:, :-1], ids[:, 1:], chunk_size=7) / (ids.shape[1] - 1)).backward()
    gradients = {
        name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    trained = {
        adapter.peft_name(name): parameter.grad
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == gradients.keys()
    for name, gradient in trained.items():
        assert_close(gradient, gradients[name], 2e-5)


def test_config_that_other_programs_understand(base, tmp_path):
    model = loaded(base, rank=4, alpha=8.0, dropout=0.1, target_modules=["q_proj", "up_proj"])
    save_adapter(model, tmp_path, "owner/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj"] and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["base_model_name_or_path"] == "owner/base" and config["lora_dropout"] == 0.1
    assert config["rank_pattern"] == {} and config["alpha_pattern"] == {}


def test_quantized_base(base, tmp_path):
    model = loaded(base, rank=4, quantize_base="nf4", use_dora=True)
    randomise(adapter_state(model).values())
    save_adapter(model, tmp_path, str(base))
    assert torch.equal(probe_logits(loaded(base, tmp_path, quantize_base="nf4")), probe_logits(model))
    assert (probe_logits(loaded(base, tmp_path)) - probe_logits(model)).abs().max() > 1e-3


def test_staged_copies_are_of_the_moment(base, tmp_path):
    model = loaded(base)
    randomise(adapter_state(model).values())
    before = probe_logits(model)
    write = adapter.stage_adapter(model, str(base), copy=True)
    for tensor in adapter_state(model).values():
        tensor.zero_()
    write(tmp_path)
    assert torch.equal(probe_logits(loaded(base, tmp_path)), before)


# --- bad input ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(base, tmp_path) -> Path:
    model = loaded(base, rank=4, target_modules=["q_proj", "down_proj"])
    randomise(adapter_state(model).values())
    save_adapter(model, tmp_path / "adapter", "owner/base")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def fails(base: Path, folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        loaded(base, folder)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa_niter_16"},
        {"trainable_token_indices": [1]},
        {"lora_bias": True},
    ],
)
def test_what_we_do_not_compute_is_refused(base, saved, changes):
    change_config(saved, **changes)
    key = next(iter(changes))
    fails(base, saved, str(saved / "adapter_config.json"), "IA3" if key == "peft_type" else key)


def test_no_adapter(base, tmp_path, saved):
    fails(base, tmp_path, "is no adapter", "adapter_config.json")
    (saved / "adapter_model.safetensors").unlink()
    fails(base, saved, "holds no adapter_model.safetensors")
    (saved / "adapter_config.json").write_text("{")
    fails(base, saved, "adapter_config.json can't be read")


def test_truncated_adapter(base, saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    fails(base, saved, str(path), "is no whole safetensors file")


def test_another_base(base, saved, tmp_path):
    shutil.copytree(base, tmp_path / "wide")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(
        UserError,
        match=r"doesn't fit this model: its base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has the shape \(4, 80\), the model needs \(4, 96\); it was made for owner/base",
    ):
        apply_adapter(on_meta(tmp_path / "wide"), saved)
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(
        UserError,
        match="it has weights for model.layers.1.self_attn.q_proj, and the model no such linear layer; it was made for owner/base",
    ):
        apply_adapter(on_meta(tmp_path / "wide"), saved)


def test_nothing_is_silently_left_out(base, saved):
    change_tensors(saved, lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(64)}))
    fails(base, saved, "it has base_model.model.model.norm.weight, and the model no adapter there")
    change_tensors(saved, lambda tensors: tensors.pop("base_model.model.model.norm.weight"))
    change_tensors(saved, lambda tensors: tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"))
    fails(
        base,
        saved,
        "the model has an adapter at base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight, and it none",
    )


def test_an_embedding_of_its_own_is_refused(base, saved):
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    change_tensors(saved, lambda tensors: tensors.update({name: embedding}))
    loaded(base, saved)
    change_tensors(saved, lambda tensors: tensors.update({name: embedding + 1}))
    fails(base, saved, name, "an embedding other than the model's")


def test_options_of_a_config(saved):
    options = lora_options(read_adapter_config(saved))
    assert options["rank"] == 4 and options["target_modules"] == ["down_proj", "q_proj"] and not options["use_dora"]


# --- checks ------------------------------------------------------------------------------------------


def test_saved_adapter_is_checked(base, saved):
    model = loaded(base, saved)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    assert check_saved_adapter(model, saved) == 0
    change_tensors(saved, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])
    with pytest.raises(UserError, match="gives other logits than the model in memory"):
        check_saved_adapter(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_changes_nothing(base, use_dora):
    model = loaded(base, use_dora=use_dora)
    with pytest.raises(UserError, match="the adapter changes nothing"):
        check_changes_something(model)
    next(iter(adapter_layers(model).values())).lora_B.data[0, 0] = 1e-30
    with pytest.raises(UserError, match="the adapter changes nothing"):
        check_changes_something(model)
    randomise(adapter_state(model).values())
    check_changes_something(model)
