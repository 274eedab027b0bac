"""Quantized linear layers hold and compute what torchao's and bitsandbytes' do."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from tests.nn.test_fake_quantize import edge_cases
from tunesmith.errors import UserError
from tunesmith.nn.float8 import FLOAT8, widened
from tunesmith.nn.linear import Linear
from tunesmith.nn.lora import apply_lora, reset_adapters
from tunesmith.nn.quantize import NF4_LEVELS, NF4Linear, dequantize_nf4, quantize_nf4
from tunesmith.nn.quantized import QDATA, SCALE
from tunesmith.nn.rounding import class_of, linear_layers, quantize_layer, rounded
from tunesmith.nn.scheme import KINDS, Scheme

DTYPES = [torch.float32, torch.bfloat16]
TORCHAO = [Scheme(kind) for kind in KINDS if kind != "nf4"] + [Scheme("int8_weight_only", 32)]


@pytest.fixture(scope="module")
def torchao():
    logging.getLogger("torchao").setLevel(logging.ERROR)
    return pytest.importorskip("torchao.quantization")


def their_tensor(weight: torch.Tensor, scheme: Scheme):
    """What torchao makes of a weight; its float8 for inputs, too, asks for a GPU only when it quantizes a model."""
    import torchao.quantization as theirs
    from torchao.core.config import config_from_dict
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    if scheme.type == "float8_dynamic":
        inputs = float8_tensor.QuantizeTensorToFloat8Kwargs(FLOAT8, theirs.PerRow())
        product = float8_tensor.Float8MMConfig(use_fast_accum=True)
        return theirs.Float8Tensor.from_hp(
            weight, granularity=theirs.PerRow(), mm_config=product, act_quant_kwargs=inputs
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    theirs.quantize_(layer, config_from_dict(scheme.to_config(())["quant_type"]["default"]))
    return layer.weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", TORCHAO, ids=str)
def test_levels_scales_and_products_are_torchaos(torchao, scheme, dtype):
    weight = edge_cases(96, 64, dtype)
    if scheme.kind.levels == "float8":
        weight[0, 0] = 1.0  # of a row of zeros torchao makes NaN
    theirs = their_tensor(weight, scheme)
    linear = nn.Linear(64, 96, dtype=dtype)
    linear.weight = nn.Parameter(weight)
    ours = quantize_layer(linear, scheme)
    assert torch.equal(ours.levels.view(torch.int8), theirs.qdata.view(torch.int8))
    assert torch.equal(ours.scales, theirs.scale) and ours.scales.dtype == theirs.scale.dtype
    assert torch.equal(ours.weight, theirs.dequantize())
    x = torch.randn(3, 5, 64).to(dtype)
    found, expected = ours(x), torch.nn.functional.linear(x, theirs, linear.bias.detach())
    assert found.dtype == expected.dtype == dtype
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens_take_another_kernel_for_the_same_numbers(dtype):
    linear = nn.Linear(64, 96, dtype=dtype).requires_grad_(False)
    layer, x = quantize_layer(linear, Scheme("int8_weight_only")), torch.randn(40, 64).to(dtype)
    expected = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), expected, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_every_float8_number_is_widened_exactly():
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    numbers = numbers[~numbers.float().isnan()]
    assert torch.equal(widened(numbers), numbers.float())


def test_a_row_of_zeros_stays_one():
    for kind in KINDS:
        linear = nn.Linear(64, 4, bias=False).requires_grad_(False)
        linear.weight[1] = 0
        assert not quantize_layer(linear, Scheme(kind))(torch.randn(3, 64))[:, 1].any()


@pytest.mark.parametrize("scheme", TORCHAO, ids=str)
def test_our_words_are_torchaos(torchao, scheme):
    from torchao.core.config import config_to_dict

    grain = torchao.PerRow() if scheme.group_size is None else torchao.PerGroup(scheme.group_size)
    mapping = torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR
    config = {
        "int8_weight_only": lambda: torchao.Int8WeightOnlyConfig(granularity=grain),
        "int8_dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "int4_weight_only": lambda: torchao.IntxWeightOnlyConfig(torch.int4, grain, mapping),
        "int8_dynamic_int4": lambda: torchao.Int8DynamicActivationIntxWeightConfig(torch.int4, grain, mapping),
        "float8_weight_only": torchao.Float8WeightOnlyConfig,
        "float8_dynamic": lambda: torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow()),
    }[scheme.type]()
    ours = json.loads(json.dumps(scheme.to_config(["lm_head"])))
    assert ours["quant_type"]["default"] == config_to_dict(config)
    assert Scheme.of_config(ours) == scheme


def test_configs_that_are_not_understood():
    coarse = Scheme("int8_weight_only").to_config(())
    coarse["quant_type"]["default"]["_data"]["granularity"] = {"_type": "PerTensor", "_data": {}}
    narrow = Scheme("int8_dynamic").to_config(())
    narrow["quant_type"]["default"]["_data"]["act_mapping_type"]["_data"] = "ASYMMETRIC"
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}
    fp4 = Scheme("nf4").to_config(()) | {"bnb_4bit_quant_type": "fp4"}
    for content in (coarse, narrow, eight, fp4, {}, None):
        with pytest.raises(UserError, match="which is not understood"):
            Scheme.of_config(content)


def test_nf4_is_bitsandbytes(dtype=torch.float32):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = edge_cases(96, 64, dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(state.code, torch.tensor(NF4_LEVELS))
    ours = quantize_nf4(weight, torch.float32)
    assert torch.equal(ours[:, 32:].contiguous().view(torch.float32).flatten(), state.absmax)
    assert (ours[:, :32].flatten() != packed.flatten()).float().mean() < 2e-3  # ties, which go to either side
    theirs = torch.cat([packed.view(-1, 32), state.absmax.view(torch.uint8).view(-1, 4)], 1)
    assert torch.equal(dequantize_nf4(theirs, weight.shape, dtype), functional.dequantize_4bit(packed, state))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_at_each_use_is_the_quantized_layer(kind):
    model, x = nn.Sequential(Linear(64, 128), nn.Tanh(), Linear(128, 32)).requires_grad_(False), torch.randn(7, 64)
    apply_lora(model, rank=4)
    reset_adapters(model, 0)
    for layer in linear_layers(model).values():
        layer.lora_B.normal_()
    before, expected = model(x), copy.deepcopy(model)
    for name, layer in linear_layers(model).items():
        plain = Linear(layer.in_features, layer.out_features)
        plain.weight, plain.bias = nn.Parameter(layer.merged_weight()), layer.bias
        setattr(expected, name, quantize_layer(plain, Scheme(kind)))
    with rounded(model, Scheme(kind)):
        assert torch.equal(model(x), expected(x))
    assert torch.equal(model(x), before) and not torch.allclose(before, expected(x))


def test_nf4_in_the_files_keeps_its_scales_under_any_number_type():
    linear = Linear(64, 8, dtype=torch.bfloat16)
    values = quantize_nf4(torch.randn(8, 64), torch.float32)
    layer = NF4Linear.prequantized(linear, values).to(torch.float16)
    assert torch.equal(layer.weight_nf4, values) and layer.is_prequantized
    assert layer.weight.dtype == torch.bfloat16
    assert class_of(Scheme("int4_weight_only", 16)).types(torch.bfloat16)[SCALE] == torch.bfloat16
    assert class_of(Scheme("float8_dynamic")).types(torch.bfloat16)[QDATA] == FLOAT8
