"""Mistral 7B and what has its shape: Llama's, with a window on every layer if the config says so."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf)
    fields = read_shape(reader)
    window = reader.take_or_null("sliding_window", default=4096)
    config = DecoderConfig(
        **fields,
        rope=read_rope(reader),
        layer_windows=(window,) * fields["num_hidden_layers"],
    )
    reader.finish()
    return config


_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read_config=read_config,
    weights=ROTARY_BUFFERS,
    chat_templates=("mistral", "mistral_v1"),
    sizes={"mistral/7B": shape(_7B, 4096, 14336, 32, 32, 8)},
    repositories={"mistral/7B": "mistralai/Mistral-7B-v0.1"},
)
