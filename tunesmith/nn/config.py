"""The numbers that shape a decoder, as plain data; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and how they are stretched beyond the context they were trained for."""

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10000.0
    """Base of the wavelengths."""
    partial_rotary_factor: float = 1.0
    """Share of a head's features that rotates; the rest is left as it is."""
    max_position_embeddings: int = 2048
    """The longest context, in tokens."""
    original_max_position_embeddings: int = 2048
    """The context before stretching, in tokens."""
    factor: float = 1.0
    """How far the context is stretched."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """Cosines and sines are multiplied by it; None: as the kind prescribes."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Names are those of a Hugging Face config.json where it has one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_out_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: Literal["per_head", "full"] | None = None
    """Normalise queries and keys: each head alone, or all heads together."""
    norm: Literal["plain", "unit_offset", "wide"] = "plain"
    """plain: rounded, then scaled; unit_offset: scaled by 1 + weight, then rounded; wide: scaled, then rounded."""
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    """Rotary positions of the layers that have a window, where they differ."""
    rope_in_float32: bool = False
    """Rotate in float32 instead of the model's dtype."""
    layer_windows: tuple[int | None, ...] = ()
    """For each layer, how many tokens it sees, its own included; None: all. Empty: all layers see all."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores are squeezed into (-cap, cap) by a tanh."""
    final_logit_softcap: float | None = None
    embedding_scale: float | None = None
    """Factor of the embeddings."""
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_hidden_layers)

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens that the model is made for, stretched rotary positions included."""
        stretched = {
            "linear": self.max_position_embeddings,
            "dynamic": self.max_position_embeddings,
            "yarn": self.rope.original_max_position_embeddings,
        }
        return max(self.max_position_embeddings, int(stretched.get(self.rope.kind, 0) * self.rope.factor))

    @property
    def depends_on_length(self) -> bool:
        """Whether rotary frequencies change with the length of the sequence."""
        return any(rope is not None and rope.depends_on_length for rope in (self.rope, self.local_rope))
