"""4-bit NormalFloat (NF4) weights for frozen linear layers: two values a byte, blocks of 64 with one scale each.

B blocks, O outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.configs.layout import QUANTIZED_BLOCK
from tunesmith.nn.linear import Linear

BLOCK_SIZE = QUANTIZED_BLOCK

# The 16 levels of NF4 (arXiv 2305.14314, appendix E): quantiles of a standard normal distribution, scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# [-1, 1] is cut into this many cells to find levels by table; the closest two midpoints are 10 cells apart, so no cell holds two.
_CELLS = 256


def _level_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell: the level at its lower edge, and the midpoint within it (or infinity), above which the next level is nearer."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(_CELLS, device=device) * (2 / _CELLS) - 1
    level = torch.bucketize(edges, midpoints)
    above = torch.cat([midpoints, torch.tensor([torch.inf], device=device)])
    return level.to(torch.uint8), above[level]


def quantize_nf4(weight: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Quantize a tensor of any shape to (B, 34) bytes, B = ceil(elements / 64): 32 bytes of levels, then the block's scale as bfloat16.

    The first of two values takes the high half of its byte. Each value goes to the level nearest to value / scale, where scale is the
    block's largest magnitude, rounded to bfloat16 first; a last block that is not full is filled with zeros.
    scale_dtype: float32 is what bitsandbytes has, (B, 36).
    """
    flat = weight.detach().reshape(-1)
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    tables = _level_tables(weight.device)
    # Pieces of 64k values keep the temporaries small (and in the processor's cache).
    return torch.cat([_quantize_blocks(piece, scale_dtype, *tables) for piece in blocks.split(1024)])


def _quantize_blocks(blocks: Tensor, scale_dtype: torch.dtype, level_at_edge: Tensor, midpoint: Tensor) -> Tensor:
    blocks = blocks.float()
    scale = blocks.abs().amax(1, keepdim=True).to(scale_dtype)
    divisor = torch.where(scale == 0, 1, scale.float())
    values = (blocks / divisor).view(-1)
    cells = ((values + 1) * (_CELLS / 2)).to(torch.int32).clamp_(0, _CELLS - 1)
    levels = level_at_edge.index_select(0, cells) + (values > midpoint.index_select(0, cells))
    high, low = levels.view(-1, 2).unbind(1)
    return torch.cat([((high << 4) | low).view(-1, BLOCK_SIZE // 2), scale.view(torch.uint8)], 1)


def dequantize_nf4(quantized: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The dense tensor of `shape` from (B, 34) or (B, 36) bytes: level × scale, computed in float32, then rounded to `dtype`."""
    levels = torch.tensor(NF4_LEVELS, device=quantized.device)
    # Both values of a byte are fetched as one 8-byte number: one look-up instead of two, and no shifts.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.int64).view(-1)
    packed, scale = quantized.tensor_split([BLOCK_SIZE // 2], 1)
    scale_dtype = torch.bfloat16 if scale.shape[1] == 2 else torch.float32
    values = pairs.index_select(0, packed.int().view(-1)).view(torch.float32).view(-1, BLOCK_SIZE)
    values = values.mul_(scale.contiguous().view(scale_dtype).float()).view(-1)
    return values[: shape.numel()].view(shape).to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """x (…, I) @ dequantized (O, I)ᵀ. Keeps neither the dense weight nor x for the backward pass, which dequantizes again."""

    @staticmethod
    def forward(ctx, x, quantized, shape):
        ctx.save_for_backward(quantized)
        ctx.shape = shape
        return x @ dequantize_nf4(quantized, shape, x.dtype).T

    @staticmethod
    def backward(ctx, *grad_outputs):
        (quantized,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad @ dequantize_nf4(quantized, ctx.shape, grad.dtype), None, None


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight (O, I) is held as NF4: 0.531 bytes a value, whatever O and I are.

    Its parameter is `weight_nf4` (B, 34); scales are kept as bytes so that no change of number type touches them. `weight` reads as the
    dense weight, made anew at each access. Checkpoints hold the dense `weight`: `load_weight` quantizes it on arrival.

    One that was quantized in the files (`prequantized`) has bitsandbytes' float32 scales, (B, 36), and is loaded as it is.
    """

    quantization = "nf4"
    weight_nf4: nn.Parameter
    is_prequantized: bool = False

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> NF4Linear:
        """The NF4 form of `linear`; on the meta device its shape only."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_linear(linear)
        return layer

    @classmethod
    def prequantized(cls, linear: nn.Linear, values: Tensor | None = None) -> NF4Linear:
        """The form of `linear` that takes what bitsandbytes quantized, with `values` (B, 36) or without."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_linear(linear, torch.float32, has_values=False)
        layer.is_prequantized = True
        if values is not None:
            layer.weight_nf4 = nn.Parameter(values, requires_grad=False)
        return layer

    def _take_linear(
        self, linear: nn.Linear, scale_dtype: torch.dtype = torch.bfloat16, has_values: bool = True
    ) -> None:
        weight = linear.weight.detach()
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, weight.dtype
        blocks, width = -(-weight.numel() // BLOCK_SIZE), BLOCK_SIZE // 2 + scale_dtype.itemsize
        quantized = torch.empty(blocks, width, dtype=torch.uint8, device=weight.device)
        self.weight_nf4 = nn.Parameter(quantized, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if has_values and not weight.is_meta:
            self.load_weight("weight", weight)

    def weight_shapes(self) -> dict[str, torch.Size]:
        """What `load_weight` takes: {name in a checkpoint: shape}."""
        return {"weight": torch.Size((self.out_features, self.in_features))}

    @torch.no_grad()
    def load_weight(self, name: str, tensor: Tensor, device: torch.device | str = "cpu") -> None:
        """Quantize the dense weight (O, I) and keep the result; where the layer is still on meta, on `device`."""
        if name != "weight" or tensor.shape != self.weight_shapes()["weight"]:
            raise ValueError(
                f"an NF4 layer of shape {tuple(self.weight_shapes()['weight'])} can't take {name} of shape {tuple(tensor.shape)}"
            )
        is_empty = self.weight_nf4.is_meta
        quantized = quantize_nf4(tensor.to(device if is_empty else self.weight_nf4.device))
        if is_empty:
            self.weight_nf4 = nn.Parameter(quantized, requires_grad=False)
        else:
            self.weight_nf4.copy_(quantized)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized weight (O, I); by default in the number type the layer had before."""
        return dequantize_nf4(self.weight_nf4, self.weight_shapes()["weight"], dtype or self.compute_dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dense_weight()

    def project_quantized(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), without bias."""
        return _FrozenLinear.apply(input, self.weight_nf4, self.weight_shapes()["weight"])  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        """(…, I) -> (…, O), in the number type of `input`."""
        output = self.project_quantized(input)
        return output if self.bias is None else output + self.bias.to(input.dtype)  # type: ignore[operator]


def quantize_linear_layers(model: nn.Module) -> list[str]:
    """Replace every nn.Linear in `model` by an NF4Linear, in place; return their names.

    On the meta device nothing is computed: weights are quantized as they are loaded, so that the dense model never exists.
    """
    names = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Linear)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NF4Linear.from_linear(model.get_submodule(name)))  # type: ignore[arg-type]
    return names
