"""The product with a weight matrix, by the kernel that is fastest for generation on a CPU.

O outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (…, I), weight (O, I), bias (O,) -> (…, O).

    In inference mode, float32 on a CPU takes other kernels for the same sums (the order of summation differs, so equal to
    about 1e-6). F.linear calls MKL there, whose product of a matrix and one row runs on one thread, and takes 1.3 to 2
    times as long on an AMD processor as its products of a batch; for more rows oneDNN is as fast for small matrices and up
    to 3 times as fast for large ones.
    Only in inference mode, so that training, and whatever is compared with it to the last digit, stays with one kernel.
    """
    if not _takes_other_kernels(x, weight):
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1] and weight.shape[0] % _BANDS == 0:
        return _one_row(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_BANDS = 8
"""What a matrix is cut into for one row: any number above one is as fast, and this one divides the outputs of most layers."""


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bands = weight.view(_BANDS, -1, weight.shape[1])
    # Transposed, not viewed as a column: that has other strides, for which a kernel is chosen that takes six times as long.
    column = x.reshape(1, 1, -1).expand(_BANDS, -1, -1).transpose(1, 2)
    y = torch.bmm(bands, column).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _takes_other_kernels(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot trace the next question
        and torch.is_inference_mode_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and type(weight) is nn.Parameter  # a tensor that is sharded or quantized knows F.linear only
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
