"""Rotary positions: frequencies of every kind, cosines and sines, and the rotation itself.

B batch, T tokens, H heads, K head size, R features of a head that rotate (R <= K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.nn.config import RopeConfig


class Rotary:
    """Cosines and sines of positions. Holds no buffer, so moving, casting or emptying a model cannot damage it."""

    def __init__(self, rope: RopeConfig, head_dim: int):
        self.rope = rope
        self.rotary_dim = int(head_dim * rope.partial_rotary_factor)
        self.factor = attention_factor(rope)
        self._cached: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, positions: Tensor, length: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cosines, and sines with the sign that `rotate` wants: float32, (B or 1, T, 1, R).

        length: tokens in the whole sequence, for the kinds that depend on it: one for all, or (T,) one for each token.
        """
        if isinstance(length, Tensor):
            lengths, which = length.unique(return_inverse=True)
            each = torch.stack([self.frequencies(positions.device, n) for n in lengths.tolist()])
            frequencies = each[which.to(positions.device)][None]
        else:
            frequencies = self.frequencies(positions.device, length)
        return self.cos_sin(positions, frequencies)

    def cos_sin(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """The same for given frequencies (R/2,), or of each row (B, 1, R/2)."""
        # cos(-x) is cos(x) and sin(-x) is -sin(x), to the bit: one product for both halves and both functions.
        angles = positions[..., None, None].float() * torch.cat((-frequencies, frequencies), -1).unsqueeze(-2)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1 else (cos * self.factor, sin * self.factor)

    def frequencies(self, device: torch.device, length: int | None) -> Tensor:
        """(R/2,) float32 angles a token."""
        key = (device, self.length_class(length))
        if key not in self._cached:
            if len(self._cached) > 64:  # "dynamic" has one entry for each length
                self._cached.clear()
            self._cached[key] = inverse_frequencies(self.rope, self.rotary_dim, key[1]).to(device)
        return self._cached[key]

    def length_class(self, length: int | None) -> int:
        """Lengths with the same frequencies fall into one class; 0 is the unstretched one."""
        if length is None or not self.rope.depends_on_length:
            return 0
        if self.rope.kind == "dynamic":
            return length if length > self.rope.max_position_embeddings else 0
        return int(length > self.rope.original_max_position_embeddings) * (
            self.rope.original_max_position_embeddings + 1
        )


def inverse_frequencies(rope: RopeConfig, dim: int, length: int = 0) -> Tensor:
    """(dim/2,) float32 angles a token for `dim` rotating features in a sequence of `length` tokens; always on the CPU."""
    with torch.device("cpu"):
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        if rope.kind == "dynamic":
            return 1.0 / _dynamic_base(rope, dim, length) ** exponents
        plain = 1.0 / rope.theta**exponents
        if rope.kind == "linear":
            return plain / rope.factor
        if rope.kind == "llama3":
            return _llama3(rope, plain)
        if rope.kind == "yarn":
            return _yarn(rope, dim, rope.theta**exponents)
        if rope.kind == "longrope":
            factors = rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)
        return plain


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1 except for yarn (arXiv 2309.00071) and longrope (arXiv 2402.13753)."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        if rope.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_base(rope: RopeConfig, dim: int, length: int) -> float:
    """The base grows with the length, so that the slowest wave still spans it ("dynamic NTK")."""
    longest = max(length, rope.max_position_embeddings)
    stretch = rope.factor * longest / rope.max_position_embeddings - (rope.factor - 1)
    return rope.theta * stretch ** (dim / (dim - 2))


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, dim: int, wavelengths: Tensor) -> Tensor:
    """Waves that turn often within the original context are kept, those that don't are stretched (arXiv 2309.00071)."""

    def feature_with(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = feature_with(rope.beta_fast), feature_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return stretched / (rope.factor * wavelengths) + (1 - stretched) / wavelengths


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features of each head: x (B, T, H, K); cos and sin (B or 1, T, 1, R) as Rotary makes them.

    Feature i is paired with feature i + R/2 (Hugging Face's order, not Meta's interleaved one); since the sines carry
    the sign, the partner is reached by a roll.
    """
    size = cos.shape[-1]
    turning = x if size == x.shape[-1] else x[..., :size]
    turned = torch.addcmul(turning * cos, turning.roll(size // 2, -1), sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)
