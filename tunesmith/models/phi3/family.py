"""Phi-3 and Phi-4: Llama's shape with one projection for queries, keys and values and one for gate and up."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS

_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, _DEFAULTS)
    fields = read_shape(reader)
    window = reader.take("sliding_window")
    config = DecoderConfig(
        **fields,
        # Early files call longrope "su", or "yarn", which it never was.
        rope=read_rope(reader, aliases={"su": "longrope", "yarn": "longrope"}, rotates_part=True),
        layer_windows=(window,) * fields["num_hidden_layers"],
    )
    reader.finish()
    return config


_PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
_PHI4 = {
    **_PHI3,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000.0,
    "sliding_window": None,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
}

FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read_config=read_config,
    model="tunesmith.models.phi3.model:FusedLM",
    tp_plan={
        "model.embed_tokens": "embedding",
        "model.layers.*.self_attn.qkv_proj": "fused_qkv",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_up_proj": "fused_pair",
        "model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "head",
    },
    weights=ROTARY_BUFFERS,
    chat_templates=("phi4", "phi3"),
    sizes={
        "phi3/mini": shape(_PHI3, 3072, 8192, 32, 32, 32),
        "phi4/14B": shape(_PHI4, 5120, 17920, 40, 40, 10),
    },
    repositories={"phi3/mini": "microsoft/Phi-3-mini-4k-instruct", "phi4/14B": "microsoft/phi-4"},
)
