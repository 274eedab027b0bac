"""OLMo 2: norms only after each half of a layer, and one norm over all query heads and one over all key heads."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import LLAMA_PLAN, DecoderConfig, Family
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, {"rms_norm_eps": 1e-5})
    fields = read_shape(reader)
    bias = reader.take("attention_bias", default=False)
    config = DecoderConfig(
        **fields,
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="full",
        norm="wide",
        rope=read_rope(reader),
        rope_in_float32=True,
    )
    reader.finish()
    return config


_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
}

FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    read_config=read_config,
    model="tunesmith.models.olmo2.model:PostNormLM",
    tp_plan={
        **LLAMA_PLAN,
        "model.layers.*.self_attn.q_norm": "all_heads",
        "model.layers.*.self_attn.k_norm": "all_heads",
    },
    weights=ROTARY_BUFFERS,
    unloadable=("Olmo2ForTokenClassification",),
    chat_templates=("olmo2",),
    sizes={
        "olmo2/1B": shape(_OLMO2, 2048, 8192, 16, 16, 16),
        "olmo2/7B": shape(_OLMO2, 4096, 11008, 32, 32, 32),
        "olmo2/13B": shape(_OLMO2, 5120, 13824, 40, 40, 40),
        "olmo2/32B": shape(_OLMO2, 5120, 27648, 64, 40, 8),
    },
    repositories={
        "olmo2/1B": "allenai/OLMo-2-0425-1B-Instruct",
        "olmo2/7B": "allenai/OLMo-2-1124-7B-Instruct",
        "olmo2/13B": "allenai/OLMo-2-1124-13B-Instruct",
        "olmo2/32B": "allenai/OLMo-2-0325-32B-Instruct",
    },
)
