"""The product with a weight matrix in inference mode equals F.linear, which is what everything else gets, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.conftest import relative_error
from tunesmith.nn.linear import Linear


@pytest.fixture(params=[(24, 16), (15, 7)], ids=["outputs in bands", "outputs not in bands"])
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


def _without_bias(layer: Linear) -> Linear:
    other = Linear(layer.in_features, layer.out_features, bias=False)
    other.weight = layer.weight
    return other
