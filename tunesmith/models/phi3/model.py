"""Phi's fused projections, kept as one matrix each, as its checkpoints and adapters have them."""

from __future__ import annotations

from torch import Tensor, nn

from tunesmith.models.decoder import Block, CausalLM
from tunesmith.models.family import DecoderConfig
from tunesmith.nn.attention import Attention
from tunesmith.nn.linear import Linear
from tunesmith.nn.mlp import ACTIVATIONS


class FusedAttention(Attention):
    def add_projections(self, config: DecoderConfig) -> None:
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, queries + 2 * keys, bias=config.attention_bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=config.attention_out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.qkv_proj(x)
        # Shares, not sizes: under tensor parallelism a rank holds the same share of each part.
        share = fused.shape[-1] // (self.num_heads + 2 * self.num_key_value_heads)
        parts = (self.num_heads * share, self.num_key_value_heads * share, self.num_key_value_heads * share)
        queries, keys, values = fused.split(parts, -1)
        return queries, keys, values


class FusedMLP(nn.Module):
    """down(act(gate) * up), gate and up being the halves of one product: (..., D) -> (..., D)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act(gate) * up)


class FusedBlock(Block):
    def add_halves(self, config: DecoderConfig, layer: int) -> None:
        self.self_attn, self.mlp = FusedAttention(config, layer), FusedMLP(config)


class FusedLM(CausalLM):
    block = FusedBlock
