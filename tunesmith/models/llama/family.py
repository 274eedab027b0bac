"""Llama 2, Code Llama, Llama 3 to 3.3, SmolLM2: the shape that others are told apart from."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.llama.sizes import REPOSITORIES, SIZES
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf)
    bias = reader.take("attention_bias", default=False)
    config = DecoderConfig(
        **read_shape(reader),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=reader.take("mlp_bias", default=False),
        rope=read_rope(reader),
    )
    reader.finish()
    return config


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read_config=read_config,
    weights=ROTARY_BUFFERS,
    chat_templates=("llama3_1", "smollm2", "llama2"),
    sizes=SIZES,
    repositories=REPOSITORIES,
)
