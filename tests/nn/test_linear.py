"""The product with a weight matrix in inference mode equals F.linear, which is what everything else gets, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.conftest import relative_error
from tunesmith.nn import linear as linear_module
from tunesmith.nn.linear import Linear, packing

SIZES = {"outputs in bands": (264, 256), "outputs not in bands": (265, 255), "small": (15, 7)}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def layer(request):
    outputs, inputs = request.param
    return Linear(inputs, outputs)


@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 1), (2, 5)])
def test_other_kernels_give_the_same_sums(layer, shape):
    x = torch.randn(*shape, layer.in_features)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        y = layer(x)
        without_bias = Linear.forward(_without_bias(layer), x)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < 1e-6
    assert relative_error(without_bias, F.linear(x, layer.weight)) < 1e-6


def test_rows_that_are_not_contiguous(layer):
    x = torch.randn(3, 4, layer.in_features)
    expected = F.linear(x[:, -1], layer.weight, layer.bias)
    with torch.inference_mode():
        assert relative_error(layer(x[:, -1]), expected) < 1e-6
        assert relative_error(layer(x[:1, -1]), expected[:1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outside_of_inference_mode_it_is_the_kernel_of_training(layer, dtype):
    layer = layer.to(dtype)
    x = torch.randn(1, 1, layer.in_features, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 8, 100])
def test_a_packed_matrix_gives_the_same_sums(layer, dtype, rows):
    layer, x = layer.to(dtype), torch.randn(2, rows, layer.in_features).to(dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.inference_mode(), packing([layer.weight]):
        for _ in range(linear_module._USES + 2):
            y = layer(x)
            assert y.dtype == dtype and relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
        assert _is_packed(layer) == (layer.weight.numel() > 1 << 16)


def test_a_matrix_is_packed_only_once_it_is_used_often_and_only_meanwhile():
    layer, x = Linear(256, 264), torch.randn(2, 256)
    with torch.inference_mode(), packing([layer.weight, layer.weight]):
        for use in range(1, linear_module._USES + 2):
            with packing([layer.weight]):  # another one that generates
                layer(x)
            assert _is_packed(layer) == (use > linear_module._USES)
    assert not hasattr(layer.weight, linear_module._COPY)
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode(), packing([layer.weight]):
        assert relative_error(layer(x), F.linear(x, layer.weight, layer.bias)) < 1e-6


def test_nothing_is_left_behind_by_what_is_interrupted():
    layer = Linear(256, 264)
    with pytest.raises(KeyboardInterrupt), packing([layer.weight]):
        raise KeyboardInterrupt
    assert not hasattr(layer.weight, linear_module._COPY)


def test_what_is_larger_than_the_limit_is_not_held_twice(monkeypatch):
    monkeypatch.setattr(linear_module, "_MOST_BYTES", 2 * 264 * 256 * 4)
    layers = [Linear(256, 264) for _ in range(3)]
    for count, may_be in ((2, True), (3, False)):
        with packing([layer.weight for layer in layers[:count]]):
            assert all(hasattr(layer.weight, linear_module._COPY) == may_be for layer in layers[:count])


def test_without_bf16_in_the_processor_nothing_of_it_is_packed(monkeypatch):
    monkeypatch.setattr(linear_module, "_has_bf16", lambda: False)
    layer, x = Linear(256, 264).bfloat16(), torch.randn(2, 256).bfloat16()
    with torch.inference_mode(), packing([layer.weight]):
        assert not hasattr(layer.weight, linear_module._COPY)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def _is_packed(layer: Linear) -> bool:
    copy = getattr(layer.weight, linear_module._COPY, None)
    return copy is not None and copy.matrix is not None


def _without_bias(layer: Linear) -> Linear:
    other = Linear(layer.in_features, layer.out_features, bias=False)
    other.weight = layer.weight
    return other
