"""The layer of Gemma 2 and 3: each half is normed on its way in and on its way out."""

from __future__ import annotations

from torch import Tensor

from tunesmith.models.decoder import Block, CausalLM
from tunesmith.models.family import DecoderConfig
from tunesmith.nn.attention import Sight
from tunesmith.nn.norm import RMSNorm


class SandwichBlock(Block):
    """`post_attention_layernorm` is what it says here, unlike in Llama, where it stands before the feed-forward."""

    def add_norms(self, config: DecoderConfig) -> None:
        super().add_norms(config)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), sight))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class SandwichLM(CausalLM):
    block = SandwichBlock
