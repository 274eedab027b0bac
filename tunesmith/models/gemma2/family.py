"""Gemma 2: norms before and after each half of a layer, soft caps, a window on every other layer."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, layer_windows, read_rope
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.gemma.family import COMMON, DEFAULTS, gemma_fields
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, DEFAULTS)
    reader.wants_nothing_of("sliding_window_size")  # another name for sliding_window in some files
    fields = gemma_fields(reader)
    usual = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(fields["num_hidden_layers"])]
    window = reader.take_or_null("sliding_window", default=4096)
    config = DecoderConfig(
        **fields,
        rope=read_rope(reader),
        attention_scale=reader.take("query_pre_attn_scalar", default=256) ** -0.5,
        attention_softcap=reader.take_or_null("attn_logit_softcapping", default=50.0),
        final_logit_softcap=reader.take_or_null("final_logit_softcapping", default=30.0),
        layer_windows=layer_windows(reader.take("layer_types", default=usual), window, fields["num_hidden_layers"]),
    )
    reader.finish()
    return config


_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    **COMMON,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read_config=read_config,
    model="tunesmith.models.gemma2.model:SandwichLM",
    weights=ROTARY_BUFFERS,
    chat_templates=("gemma",),
    sizes={
        "gemma2/2B": shape(_GEMMA2, 2304, 9216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256),
        "gemma2/9B": shape(_GEMMA2, 3584, 14336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256),
        "gemma2/27B": shape(_GEMMA2, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    },
    repositories={
        "gemma2/2B": "google/gemma-2-2b",
        "gemma2/9B": "google/gemma-2-9b",
        "gemma2/27B": "google/gemma-2-27b",
    },
)
