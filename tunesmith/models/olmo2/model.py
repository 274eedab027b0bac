"""OLMo 2's layer: each half is normed only on its way out."""

from __future__ import annotations

from torch import Tensor

from tunesmith.models.decoder import Block, CausalLM
from tunesmith.models.family import DecoderConfig
from tunesmith.nn.attention import Sight
from tunesmith.nn.norm import RMSNorm


class PostNormBlock(Block):
    def add_norms(self, config: DecoderConfig) -> None:
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, sight))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class PostNormLM(CausalLM):
    block = PostNormBlock
