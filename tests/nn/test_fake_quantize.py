"""Fake quantization computes what the converted layers compute, torchao's and ours, and learns through it."""

import copy
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.errors import UserError
from tunesmith.nn.fake_quantize import apply_fake_quantization, set_rounding
from tunesmith.nn.float8 import FLOAT8, Float8Rounding
from tunesmith.nn.int4 import (
    Int4Linear,
    group_scales,
    quantize_groups,
    round_tokens,
    token_range,
    token_scales,
)
from tunesmith.nn.linear import Linear
from tunesmith.nn.lora import adapters_off, apply_lora, merge_lora, reset_adapters, reset_magnitudes
from tunesmith.nn.quantized import PARTS
from tunesmith.nn.rounding import apply_quantized, quantize_layer
from tunesmith.nn.scheme import KINDS, TRAINED, Scheme

SCHEMES = list(TRAINED.values())
DYNAMIC = [kind for kind in SCHEMES if KINDS[kind].rounds_inputs]
INTEGERS = [kind for kind in SCHEMES if KINDS[kind].levels == "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def torchao():
    logging.getLogger("torchao").setLevel(logging.ERROR)
    return pytest.importorskip("torchao.quantization")


def config_of(scheme: Scheme):
    """torchao's own config for a scheme, as it reads it from ours."""
    from torchao.core.config import config_from_dict

    return config_from_dict(scheme.to_config(())["quant_type"]["default"])


def two_layers(dtype=torch.float32, bias=True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(64, 96, bias=bias), nn.Tanh(), Linear(96, 32, bias=bias)).to(dtype)


def edge_cases(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, with groups of zeros, of one sign, of huge and tiny values, and with ties at half a step."""
    torch.manual_seed(1)
    x = torch.randn(rows, columns)
    x[0] = 0
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] *= 1e4
    x[4] *= 1e-6
    x[5, ::2] = 7.5
    x[6] = torch.arange(columns) / 2 - 8
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 16])
def test_levels_and_scales_are_torchaos_to_the_bit(torchao, dtype, group_size):
    layer = nn.Linear(64, 96, bias=False, dtype=dtype)
    layer.weight = nn.Parameter(edge_cases(96, 64, dtype))
    scales = group_scales(layer.weight.detach(), group_size)
    levels = quantize_groups(layer.weight.detach(), scales)
    torchao.quantize_(layer, config_of(Scheme("int4_weight_only", group_size)))
    assert scales.dtype == dtype and torch.equal(scales, layer.weight.scale)
    assert torch.equal(levels.to(torch.int8), layer.weight.qdata) and not layer.weight.zero_point.any()
    assert levels.min() == -8 and levels.max() == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_inputs_are_torchaos_to_the_bit(torchao, dtype):
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as theirs

    x = edge_cases(40, 64, dtype).view(4, 10, 64)
    ours = round_tokens(x, *token_scales(token_range(x)))
    assert ours.dtype == dtype and torch.equal(ours, theirs._apply_int8_act_asym_per_token_quant_dequant(x))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", INTEGERS)
def test_the_forward_pass_is_that_of_the_converted_layers(torchao, kind, dtype):
    model, x = two_layers(dtype), edge_cases(12, 64, dtype)
    converted, scheme = copy.deepcopy(model), Scheme(kind)
    torchao.quantize_(converted, config_of(scheme))
    assert apply_fake_quantization(model, scheme) == ["0", "2"]
    ours, theirs = model(x), converted(x)
    assert not torch.allclose(ours, two_layers(dtype)(x))
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCHEMES)
def test_the_forward_pass_is_that_of_our_quantized_layers_to_the_bit(kind, dtype):
    model, x, scheme = two_layers(dtype), edge_cases(12, 64, dtype), Scheme(kind)
    converted = nn.Sequential(quantize_layer(model[0], scheme), model[1], quantize_layer(model[2], scheme))
    apply_fake_quantization(model, scheme)
    assert torch.equal(model(x), converted(x)) and torch.equal(model(x[:1]), converted(x[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCHEMES)
def test_parts_are_rounded_as_the_whole(kind, dtype):
    """Those of two ranks that share the inputs, by the larger of their reaches."""
    model, whole = two_layers(), edge_cases(12, 64, dtype)
    apply_fake_quantization(model, Scheme(kind))
    rounding, parts = model[0].rounding, whole.chunk(2, -1)
    for reach_of, rounds in (
        (rounding.token_reach, rounding.round_tokens),
        (rounding.weight_reach, rounding.round_weight),
    ):
        reaches = [reach_of(part) for part in parts]
        reach = None if reaches[0] is None else torch.maximum(*reaches)
        found = torch.cat([rounds(part, reach) for part in parts], -1)
        assert torch.equal(found, rounds(whole, reach_of(whole)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_rows_are_torchaos_float8(torchao, dtype):
    """But for rows of zeros, of which torchao makes NaN."""
    from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizeConfig, Float8FakeQuantizer

    x, rounding = edge_cases(12, 64, dtype)[1:], Float8Rounding(Scheme("float8_dynamic"))
    theirs = torchao.Float8Tensor.from_hp(x, granularity=torchao.PerRow())
    rows = rounding.round_weight(x, rounding.weight_reach(x))
    assert rows.dtype == dtype and torch.equal(rows, theirs.dequantize())
    tokens = x.view(1, 11, 64)
    ours = rounding.round_tokens(tokens, rounding.token_reach(tokens))
    assert torch.equal(ours, Float8FakeQuantizer(Float8FakeQuantizeConfig(FLOAT8, torchao.PerRow()))(tokens))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_float8_products_are_torchaos(torchao, dtype):
    """Whose kernel sums in float32, as we do, in another order, and rounds to the number type at other places."""
    from tests.nn.test_rounding import their_tensor

    model, x = nn.Sequential(Linear(64, 96)).to(dtype), torch.randn(12, 64).to(dtype)
    weight = their_tensor(model[0].weight.detach(), Scheme("float8_dynamic"))
    expected = F.linear(x, weight, model[0].bias)
    apply_fake_quantization(model, Scheme("float8_dynamic"))
    error = (model(x).float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("kind", INTEGERS)
def test_int4_layers_compute_the_same(torchao, kind):
    """Of values that torchao made, zero points other than 0 among them."""
    plain, scheme = two_layers(), Scheme(kind)
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    torchao.quantize_(theirs, config_of(scheme))
    apply_quantized(ours, {"0": PARTS, "2": PARTS}, scheme)
    for index in (0, 2):
        theirs[index].weight.zero_point.fill_(3)
        layer, stored = ours[index], theirs[index].weight
        assert isinstance(layer, Int4Linear)
        for name, value in zip(layer._parameters, (stored.qdata, stored.scale, stored.zero_point)):
            layer.get_parameter(name).copy_(value)
        assert torch.equal(layer.weight, stored.dequantize())
    x = edge_cases(12, 64, torch.float32)
    torch.testing.assert_close(ours(x), theirs(x))
    with pytest.raises(UserError, match="no linear layer of the model"):
        apply_quantized(two_layers(), {"1": PARTS}, scheme)
    with pytest.raises(UserError, match="64 inputs of 0 are no whole groups of 48"):
        apply_quantized(two_layers(), {"0": PARTS}, Scheme(kind, 48))


@pytest.mark.parametrize("kind", INTEGERS)
def test_our_words_are_torchaos(torchao, kind):
    from torchao.core.config import config_to_dict

    mapping = torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR
    if kind == "int4_weight_only":
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(64), mapping_type=mapping
        )
    else:
        config = torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(64), weight_mapping_type=mapping
        )
    scheme = Scheme(kind, 64)
    ours = scheme.to_config(["lm_head"])
    assert ours["quant_type"]["default"] == config_to_dict(config)
    assert Scheme.of_config(json.loads(json.dumps(ours))) == scheme
    ours["quant_type"]["default"]["_data"]["weight_dtype"]["_data"] = "int2"
    for other in (ours, {"quant_method": "gptq"}, "awq", {"quant_method": "torchao", "quant_type": "int4"}):
        with pytest.raises(UserError, match="which is not understood"):
            Scheme.of_config(other)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, rounded):
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def through_autograd(layer, x, weight):
    """The same product by a plain graph in which rounding has the gradient 1."""
    dense, inputs = weight.detach(), x.detach()
    if layer.scheme.kind.levels == "float8":
        steps = [value.abs().amax(-1, keepdim=True) / 448 for value in (dense, inputs)]
        dense, inputs = ((one / step).to(FLOAT8).float() * step for one, step in zip((dense, inputs), steps))
    else:
        scales = group_scales(dense, 32)
        dense = (quantize_groups(dense, scales).unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
        inputs = round_tokens(inputs, *token_scales(token_range(inputs)))
    return F.linear(_Straight.apply(x, inputs), _Straight.apply(weight, dense), layer.bias)


def gradients(output, tensors):
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), tensors)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_gradients_pass_straight_through(kind):
    """Also to the largest weight of a group."""
    model = nn.Sequential(Linear(64, 96))
    with torch.no_grad():
        model[0].weight[0, 0] = 9.0
    apply_fake_quantization(model, Scheme(kind))
    layer, x = model[0], torch.randn(2, 6, 64, requires_grad=True)
    tensors = [x, layer.weight, layer.bias]
    for ours, theirs in zip(gradients(layer(x), tensors), gradients(through_autograd(layer, x, layer.weight), tensors)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert gradients(layer(x), tensors)[1][0, 0] != 0


def with_adapter(use_dora=False, base=None):
    model = nn.Sequential(Linear(64, 96)) if base is None else base
    apply_lora(model, rank=4, use_dora=use_dora, target_modules=["0"])
    reset_adapters(model, 0)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer = model[0]
    layer.lora_B.normal_(std=0.3)
    if use_dora:
        reset_magnitudes(model)
        layer.lora_magnitude.mul_(1.1)
        layer.lora_magnitude.requires_grad_()
    layer.lora_A.requires_grad_()
    layer.lora_B.requires_grad_()
    return model


@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_with_an_adapter_the_merged_weight_is_what_is_rounded(torchao, use_dora, kind):
    model = with_adapter(use_dora)
    plain, x = copy.deepcopy(model), torch.randn(2, 6, 64, requires_grad=True)
    apply_fake_quantization(model, Scheme(kind))
    layer = model[0]

    deployed = copy.deepcopy(plain)
    merge_lora(deployed)
    if kind in INTEGERS:
        torchao.quantize_(deployed, config_of(layer.scheme))
    else:  # torchao converts a model on a GPU only
        deployed[0] = quantize_layer(deployed[0], layer.scheme)
    torch.testing.assert_close(model(x), deployed(x))

    tensors = [x, layer.lora_A, layer.lora_B] + ([layer.lora_magnitude] if use_dora else [])
    change = layer.weight + layer.lora.scaling * layer.lora_B @ layer.lora_A
    if use_dora:
        change = change * (layer.lora_magnitude / layer.row_norms())[:, None]
    for ours, theirs in zip(gradients(model(x), tensors), gradients(through_autograd(layer, x, change), tensors)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    with adapters_off(model):
        assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))
    assert merge_lora(model) == ["0"]
    assert type(model[0]) is Linear and torch.equal(model[0](x), merge_and_run(plain, x))


def merge_and_run(model, x):
    merge_lora(model)
    return model(x)


@pytest.mark.parametrize("kind", DYNAMIC)
def test_before_its_time_it_computes_with_plain_numbers(kind):
    model, x = two_layers(), torch.randn(3, 64)
    apply_fake_quantization(model, Scheme(kind))
    rounded = model(x)
    assert set_rounding(model, False) and not set_rounding(model, False)
    assert torch.equal(model(x), two_layers()(x)) and not torch.equal(model(x), rounded)
    assert set_rounding(model, True) and torch.equal(model(x), rounded)


def test_layers_whose_groups_do_not_come_out_even_are_left():
    model = nn.Sequential(Linear(64, 80), Linear(80, 64))
    assert apply_fake_quantization(model, Scheme("int4_weight_only", 32)) == ["0"]
    assert type(model[1]) is Linear


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", SCHEMES)
def test_under_autocast_it_rounds_in_the_number_type_of_the_computation(kind, dtype):
    model, x = two_layers(), torch.randn(3, 64)
    low = copy.deepcopy(model).to(dtype)
    for one in (model, low):
        apply_fake_quantization(one, Scheme(kind))
    with torch.autocast("cpu", dtype):
        found = model[0](x)
    assert torch.equal(found, low[0](x.to(dtype))) and found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.float().sum(), model[0].weight)
    assert gradient.dtype == torch.float32 and math.isfinite(gradient.sum())


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_under_autocast_adapters_are_merged_in_float32(torchao, use_dora):
    model, x = with_adapter(use_dora), torch.randn(3, 64)
    deployed = copy.deepcopy(model)
    merge_lora(deployed)
    deployed.to(torch.bfloat16)
    apply_fake_quantization(model, Scheme("int8_dynamic_int4"))
    torchao.quantize_(deployed, config_of(model[0].scheme))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    torch.testing.assert_close(found, deployed(x.to(torch.bfloat16)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SCHEMES)
def test_compiled_as_runs_do_it_bfloat16_is_rounded_to_the_bit(kind):
    model, x = two_layers(torch.bfloat16), edge_cases(12, 64, torch.bfloat16)
    apply_fake_quantization(model, Scheme(kind))
    compiled = torch.compile(model, fullgraph=True, options={"emulate_precision_casts": True})
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", DYNAMIC)
@pytest.mark.parametrize("use_dora", [None, False, True], ids=["full", "lora", "dora"])
def test_compiled_it_computes_the_same(use_dora, kind):
    model = two_layers() if use_dora is None else with_adapter(use_dora, two_layers())
    apply_fake_quantization(model, Scheme(kind))
    x = torch.randn(5, 64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = [gradients(model(x), trained)]
    set_rounding(model, False)
    expected.insert(0, gradients(model(x), trained))
    torch._dynamo.reset()  # the limit on compiling the same code anew counts other tests, too
    compiled = torch.compile(model, fullgraph=True)
    for rounds, wanted in zip((False, True), expected):
        set_rounding(model, rounds)
        for ours, theirs in zip(gradients(compiled(x), trained), wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
