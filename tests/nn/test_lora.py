"""Adapters compute what PEFT's do: outputs and every gradient."""

import re

import pytest
import torch
from torch import nn

from tunesmith.errors import UserError
from tunesmith.nn.head import Head
from tunesmith.nn.linear import Linear
from tunesmith.nn.lora import (
    NF4LoRALinear,
    adapter_layers,
    adapter_state,
    adapters_off,
    apply_lora,
    freeze_base,
    merge_lora,
    reset_adapters,
)
from tunesmith.nn.quantize import NF4Linear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(64, 48, bias=True)
        self.up_proj = nn.Linear(48, 80, bias=False)
        self.down_proj = nn.Linear(80, 64, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.q_proj(x))))


class Model(nn.Module):
    """Two blocks and a head over random embeddings."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block()})
        self.lm_head = Head(64, 96, self.embed_tokens if tied else None)

    def forward(self, ids):
        hidden = self.embed_tokens(ids)
        for layer in self.layers.values():
            hidden = layer(hidden)
        return self.lm_head(hidden)


class PlainModel(Model):
    """The same with an nn.Linear as head, for PEFT."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(64, 96, bias=False)


IDS = torch.arange(24).view(2, 12)


def make_model(tied: bool = False) -> Model:
    torch.manual_seed(0)
    model = Model(tied)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give adapters values as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter_state(model).items():
        if not name.endswith("lora_magnitude"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        else:
            tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_equal_peft(use_dora, use_rslora, dropout):
    from peft import LoraConfig, get_peft_model

    ours = make_model()
    reference = PlainModel()
    reference.load_state_dict(ours.state_dict())
    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(
        r=6, lora_alpha=10, lora_dropout=dropout, target_modules=targets, use_dora=use_dora, use_rslora=use_rslora
    )
    theirs = get_peft_model(reference, config)
    apply_lora(ours, 6, 10, dropout, targets, use_dora=use_dora, use_rslora=use_rslora)
    reset_adapters(ours, seed=0)
    randomise(ours)
    trained = freeze_base(ours)
    counterpart = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = (
                name.removeprefix("base_model.model.")
                .replace(".default", "")
                .replace("_vector", "")
                .removesuffix(".weight")
            )
            counterpart[name] = parameter
    assert sorted(counterpart) == sorted(trained)
    for name, tensor in adapter_state(ours).items():
        counterpart[name].data.copy_(tensor)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model(IDS))
        outputs[-1].square().sum().backward()
    assert_close(*outputs)
    for name, parameter in ours.named_parameters():
        if name in counterpart:
            assert_close(parameter.grad, counterpart[name].grad)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantize_base", [None, "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_fresh_adapters_change_nothing(use_dora, quantize_base, tied):
    model = make_model(tied)
    if quantize_base:
        before = apply_nf4(make_model(tied))(IDS)
    else:
        before = model(IDS)
    apply_lora(model, target_modules=["q_proj", "up_proj", "lm_head"], use_dora=use_dora, quantize_base=quantize_base)
    reset_adapters(model, seed=0)
    assert_close(model(IDS), before, 1e-6)
    randomise(model)
    assert (model(IDS) - before).abs().max() > 0.01
    with adapters_off(model):
        assert torch.equal(model(IDS), before)
    assert (model(IDS) - before).abs().max() > 0.01


def apply_nf4(model):
    from tunesmith.nn.quantize import quantize_linear_layers

    quantize_linear_layers(model)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_merging_keeps_the_outputs(use_dora, tied):
    model = make_model(tied)
    apply_lora(model, target_modules=["q_proj", "down_proj", "lm_head"], use_dora=use_dora)
    reset_adapters(model, seed=0)
    randomise(model)
    before = model(IDS)
    names = merge_lora(model)
    assert len(names) == 5
    assert not adapter_layers(model) and not adapter_state(model)
    assert type(model.lm_head) is Head and model.lm_head.tied_to is None
    assert type(model.layers["0"].q_proj) is Linear
    assert_close(model(IDS), before)
    assert sorted(model.state_dict()) == sorted(PlainModel().state_dict())


def test_merging_rounds_once():
    model = make_model().to(torch.bfloat16)
    apply_lora(model, 4, target_modules=["q_proj"], dtype=torch.float32)
    reset_adapters(model, seed=0)
    randomise(model)
    layer = model.layers["1"].q_proj
    assert layer.lora_A.dtype == torch.float32
    wanted = (layer.weight.double() + layer.lora.scaling * layer.lora_B.double() @ layer.lora_A.double()).to(
        torch.bfloat16
    )
    merge_lora(model)
    assert (model.layers["1"].q_proj.weight != wanted).sum() <= 2


@pytest.mark.parametrize("use_dora", [False, True])
def test_quantized_base_equals_lora_on_its_dequantized_weights(use_dora):
    quantized, dense = make_model(), make_model()
    apply_lora(quantized, 4, use_dora=use_dora, quantize_base="nf4")
    for name, layer in adapter_layers(quantized).items():
        assert type(layer) is NF4LoRALinear
        dense.get_submodule(name).weight.data.copy_(layer.dense_weight())
    apply_lora(dense, 4, use_dora=use_dora)
    for model in (quantized, dense):
        reset_adapters(model, seed=3)
        randomise(model)
        freeze_base(model)
        output = model(IDS)
        output.square().sum().backward()
    assert_close(output, quantized(IDS))
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, dense.get_parameter(name).grad)
    with pytest.raises(UserError, match="is held in NF4"):
        merge_lora(quantized)


def test_quantized_base_covers_layers_without_adapter():
    model = make_model()
    apply_lora(model, target_modules=["q_proj"], quantize_base="nf4")
    assert type(model.layers["0"].up_proj) is NF4Linear
    assert type(model.lm_head) is Head


def test_initialisation_depends_on_seed_and_name_only():
    few, all_layers = make_model(), make_model()
    apply_lora(few, target_modules=["q_proj"])
    apply_lora(all_layers)
    for model in (few, all_layers):
        reset_adapters(model, seed=7)
    name = "layers.1.q_proj.lora_A"
    assert torch.equal(adapter_state(few)[name], adapter_state(all_layers)[name])
    assert not torch.equal(adapter_state(few)[name], adapter_state(few)["layers.0.q_proj.lora_A"])
    values = adapter_state(few)[name]
    assert values.abs().max() <= 1 / 8 and values.std() > 0.9 / 8 / 3**0.5


def test_on_meta_then_materialized():
    with torch.device("meta"):
        model = Model()
    apply_lora(model, use_dora=True, quantize_base="nf4")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    source = make_model()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            module.load_weight("weight", source.get_submodule(name).weight)
            if module.bias is not None:
                module.bias.data.copy_(source.get_submodule(name).bias)
    model.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    reset_adapters(model, seed=0)
    assert_close(model(IDS), apply_nf4(make_model())(IDS), 1e-6)


def test_adapters_on_meta_are_created_beside_loaded_weights():
    model = make_model()
    apply_lora(model, use_dora=True)
    for name, tensor in adapter_state(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor.to("meta")))
    reset_adapters(model, seed=0, device="cpu")
    assert_close(model(IDS), make_model()(IDS), 1e-6)


def test_freezing():
    model = make_model()
    apply_lora(model, target_modules=["up_proj"])
    assert freeze_base(model) == [f"layers.{i}.up_proj.lora_{x}" for i in "01" for x in "AB"]
    assert not model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    "target, names",
    [
        ("all-linear", ["0.q_proj", "0.up_proj", "0.down_proj", "1.q_proj", "1.up_proj", "1.down_proj"]),
        (["q_proj"], ["0.q_proj", "1.q_proj"]),
        ("up_proj", ["0.up_proj", "1.up_proj"]),
        (["layers.1.q_proj", "0.up_proj"], ["0.up_proj", "1.q_proj"]),
        (r".*\.1\.(q|up)_proj", ["1.q_proj", "1.up_proj"]),
    ],
)
def test_targets(target, names):
    assert apply_lora(make_model(), target_modules=target) == [f"layers.{name}" for name in names]


@pytest.mark.parametrize("target", [["q_prj"], "q_prj", ["embed_tokens"], r".*\.7\.q_proj", "("])
def test_unknown_targets_are_named(target):
    with pytest.raises(UserError) as error:
        apply_lora(make_model(), target_modules=target)
    shown = target[0] if isinstance(target, list) else target
    assert repr(shown) in str(error.value)
    if "q_prj" in target:
        assert "did you mean 'q_proj'?" in str(error.value) and "there are q_proj, up_proj, down_proj, lm_head" in str(
            error.value
        )


def test_patterns_give_single_layers_their_rank():
    model = make_model()
    apply_lora(model, 4, 8, rank_pattern={"q_proj": 2, r"layers\.1\.up_proj": 3}, alpha_pattern={"q_proj": 32})
    settings = {name: (layer.lora.rank, layer.lora.scaling) for name, layer in adapter_layers(model).items()}
    assert settings["layers.0.q_proj"] == (2, 16.0)
    assert settings["layers.1.up_proj"] == (3, 8 / 3)
    assert settings["layers.0.up_proj"] == (4, 2.0)


def test_head_losses_train_the_adapter():
    model = make_model(tied=True)
    apply_lora(model, target_modules=["lm_head"])
    reset_adapters(model, seed=0)
    randomise(model)
    freeze_base(model)
    labels = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = model.embed_tokens(IDS).detach()
    gradients = []
    for loss in (
        model.lm_head.cross_entropy(hidden, labels, chunk_size=5),
        nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten(), reduction="sum"),
    ):
        gradients.append(torch.autograd.grad(loss, [model.lm_head.lora_A, model.lm_head.lora_B]))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_float32_adapter_beside_bfloat16_base():
    model = make_model().to(torch.bfloat16)
    apply_lora(model, use_dora=True, dtype=torch.float32)
    reset_adapters(model, seed=0)
    freeze_base(model)
    output = model(IDS)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(
        re.search("lora", name) and p.grad.dtype == torch.float32
        for name, p in model.named_parameters()
        if p.requires_grad
    )


def test_dora_learns_small_magnitudes_in_bfloat16():
    """Near 1, bfloat16 has steps of 0.4 to 0.8 %: the change of a row's length must be taken before it is rounded."""
    linear = nn.Linear(64, 512, bias=False)
    model = nn.Sequential(linear).to(torch.bfloat16)
    apply_lora(model, use_dora=True, dtype=torch.float32)
    reset_adapters(model, seed=0)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    before = model(x).float()
    with torch.no_grad():
        model[0].lora_magnitude *= 1.003
    change = (model(x).float() * before).sum() / before.square().sum() - 1
    assert change.item() == pytest.approx(0.003, rel=0.3)
