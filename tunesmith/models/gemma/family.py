"""Gemma: Llama's shape with scaled embeddings, norms around 1 and a GELU gate."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS

DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, DEFAULTS)
    config = DecoderConfig(**gemma_fields(reader), rope=read_rope(reader))
    reader.finish()
    return config


def gemma_fields(reader: ConfigJson) -> dict[str, Any]:
    """What Gemma, Gemma 2 and Gemma 3 have in common."""
    fields = read_shape(reader)
    if fields["hidden_act"] == "gelu":  # early files say so and mean the tanh approximation
        fields["hidden_act"] = "gelu_pytorch_tanh"
    bias = reader.take("attention_bias", default=False)
    return dict(
        **fields,
        attention_bias=bias,
        attention_out_bias=bias,
        norm="unit_offset",
        embedding_scale=fields["hidden_size"] ** 0.5,
    )


COMMON = {
    "vocab_size": 256000,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    **COMMON,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
}

FAMILY = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    read_config=read_config,
    weights=ROTARY_BUFFERS,
    chat_templates=("gemma",),
    sizes={
        "gemma/2B": shape(_GEMMA, 2048, 16384, 18, 8, 1),
        "gemma/7B": shape(_GEMMA, 3072, 24576, 28, 16, 16),
    },
    repositories={"gemma/2B": "google/gemma-2b", "gemma/7B": "google/gemma-7b"},
)
