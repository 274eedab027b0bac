"""NF4: against the definition, written out once more, and against torchao's and bitsandbytes' levels."""

import pytest
import torch
from torch import nn

from tunesmith.nn.quantize import NF4_LEVELS, NF4Linear, dequantize_nf4, quantize_linear_layers, quantize_nf4


def reference(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 makes of a weight, value by value: nearest level times the block's bfloat16 scale."""
    flat = weight.reshape(-1).tolist()
    result = []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = torch.tensor(max(abs(value) for value in block)).to(torch.bfloat16).item()
        for value in block:
            level = min(NF4_LEVELS, key=lambda level: abs(value / scale - level)) if scale else 0.0
            result.append(level * scale)
    return torch.tensor(result).view(weight.shape)


@pytest.mark.parametrize("shape", [(8, 64), (3, 192), (64, 172), (5, 7), (1, 1), (3, 43)])
def test_equals_the_definition(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    restored = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    torch.testing.assert_close(restored, reference(weight), rtol=1e-6, atol=0)


def test_every_level_survives():
    weight = torch.tensor(NF4_LEVELS).repeat(4)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32), weight)


def test_values_beside_midpoints_go_to_the_nearer_level():
    levels = torch.tensor(NF4_LEVELS)
    middle = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([middle - 1e-6, middle + 1e-6, levels, torch.tensor([1.0])])
    values = torch.cat([values, torch.zeros(64 - len(values))])
    restored = dequantize_nf4(quantize_nf4(values), values.shape, torch.float32)
    assert torch.equal(restored[:15], levels[:-1])
    assert torch.equal(restored[15:30], levels[1:])


def test_zeros_and_extremes():
    weight = torch.cat([torch.zeros(64), torch.full((64,), 1e-30), torch.full((64,), -3e38)])
    restored = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    assert torch.equal(restored[:64], weight[:64])
    torch.testing.assert_close(restored, weight, rtol=2**-8, atol=0)


def test_takes_at_most_0_55_bytes_a_value():
    layer = NF4Linear.from_linear(nn.Linear(256, 512, bias=False))
    size = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    assert size / (256 * 512) == 0.53125
    layer = NF4Linear.from_linear(nn.Linear(172, 64, bias=False))
    assert sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters()) / (172 * 64) <= 0.55


@pytest.mark.filterwarnings("ignore")
def test_levels_are_those_of_torchao_and_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(
        functional.get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_LEVELS), rtol=1e-6, atol=1e-7
    )
    quantization = pytest.importorskip("torchao.quantization")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    ours = dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    others = [functional.dequantize_4bit(packed, state), quantization.to_nf4(weight, 64, 4).get_original_weight()]
    for theirs in others:
        # Scales are rounded differently (bfloat16; float32; two levels of 8 bits): a part of the error that NF4 itself makes.
        assert (ours - theirs).square().mean().sqrt() < 0.2 * (theirs - weight).square().mean().sqrt()
        assert (ours - weight).square().mean() < 1.01 * (theirs - weight).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_dequantized_weight(dtype):
    torch.manual_seed(0)
    dense = nn.Linear(172, 48, dtype=dtype)
    layer = NF4Linear.from_linear(dense)
    dense = nn.Linear(172, 48, dtype=dtype)
    dense.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(2, 5, 172, dtype=dtype)
    results = []
    for module in (layer, dense):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.sum().backward()
        results.append((output, leaf.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_backward_keeps_no_dense_weight():
    layer = NF4Linear.from_linear(nn.Linear(256, 256, bias=False))
    x = torch.randn(4, 256, requires_grad=True)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(sizes) == layer.weight_nf4.numel()


def test_change_of_number_type_keeps_the_weight():
    layer = NF4Linear.from_linear(nn.Linear(64, 64))
    before = layer.dense_weight(torch.float32)
    assert torch.equal(layer.to(torch.float16).to(torch.bfloat16).dense_weight(torch.float32), before)


def test_dense_model_never_exists():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    assert quantize_linear_layers(model) == ["0", "1"]
    assert all(parameter.is_meta for parameter in model.parameters())
    weight = torch.randn(128, 64)
    model[0].load_weight("weight", weight)  # an empty layer makes room as the weight arrives
    assert torch.equal(model[0].weight, dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32))
    model[0].load_weight("weight", -weight)  # a full one keeps its storage
    assert torch.equal(model[0].weight, dequantize_nf4(quantize_nf4(-weight), weight.shape, torch.float32))


def test_a_wrong_shape_is_refused():
    layer = NF4Linear.from_linear(nn.Linear(64, 128))
    with pytest.raises(ValueError, match=r"shape \(128, 64\) can't take weight of shape \(64, 128\)"):
        layer.load_weight("weight", torch.zeros(64, 128))
