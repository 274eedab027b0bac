"""The product with a weight matrix, by the kernel that is fastest for generation on a CPU.

O outputs, I inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cache as cached

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

    In inference mode, a CPU takes other kernels for the same sums (the order of summation differs, so float32 is equal to
    about 1e-6). F.linear calls MKL for float32, whose product of a matrix and one row runs on one thread, and takes 1.3 to 2
    times as long on an AMD processor as its products of a batch; for more rows oneDNN is as fast for small matrices and up
    to 3 times as fast for large ones, and twice as fast again for a few rows where the matrix is packed (`packing`).
    Only in inference mode, so that training, and whatever is compared with it to the last digit, stays with one kernel.
    """
    if not _takes_other_kernels(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32 and x.numel() == x.shape[-1] and weight.shape[0] % _BANDS == 0:
        return _one_row(x, weight, bias)
    copy: _Packed | None = getattr(weight, _COPY, None)
    matrix = weight if copy is None else copy.of(weight)
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


_SMALL = 1 << 16
"""Numbers of a matrix up to which F.linear is quickest: a call of oneDNN costs 12 microseconds more."""
_USES = 8
"""Products after which a matrix is packed: packing takes as long as four or five of them save."""
_MOST_BYTES = 1 << 30
"""Of copies: those of a larger model would take memory that it needs."""
_COPY = "packed_for_onednn"


@contextlib.contextmanager
def packing(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let `linear` hold matrices (O, I) that it meets often a second time, laid out as oneDNN's kernels on a CPU take them.

    Else they are laid out anew for every product, which takes as long as the product with a few rows itself. Meanwhile they must
    not change. Nothing is held of small and other tensors, and where all copies would take more than 1 GiB.
    """
    chosen = [one for one in weights if _can_be_packed(one) and not hasattr(one, _COPY)]
    if sum(one.nbytes for one in chosen) > _MOST_BYTES:
        chosen = []
    try:
        for one in chosen:
            setattr(one, _COPY, _Packed())
        yield
    finally:
        for one in chosen:
            vars(one).pop(_COPY, None)  # another thread that generates may have been here


class _Packed:
    """A matrix as oneDNN's kernels take it, once it has been used some times."""

    def __init__(self):
        self.uses = 0
        self.matrix: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        self.uses += 1
        if self.matrix is None and self.uses > _USES:
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return weight if self.matrix is None else self.matrix


def _can_be_packed(weight: Tensor) -> bool:
    return (
        weight.numel() > _SMALL
        and weight.is_cpu
        and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and _has_bf16())
        and type(weight) is nn.Parameter  # a tensor that is sharded or quantized knows F.linear only
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
    )


@cached
def _has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


_BANDS = 8
"""What a matrix is cut into for one row: any number above one is as fast, and this one divides the outputs of most layers."""


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bands = weight.view(_BANDS, -1, weight.shape[1])
    # Transposed, not viewed as a column: that has other strides, for which a kernel is chosen that takes six times as long.
    column = x.reshape(1, 1, -1).expand(_BANDS, -1, -1).transpose(1, 2)
    y = torch.bmm(bands, column).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _takes_other_kernels(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        weight.numel() > _SMALL  # first, since such matrices are many
        and not torch.compiler.is_compiling()  # a compiler cannot trace the next question
        and torch.is_inference_mode_enabled()
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == weight.dtype)
        and (x.dtype == torch.float32 or hasattr(weight, _COPY))  # F.linear takes oneDNN for bf16 itself
        and x.is_cpu
        and _can_be_packed(weight)
        and not torch.is_autocast_enabled("cpu")
    )
