"""Qwen3, dense: Llama's shape with a norm on every query and key head."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, read_rope, read_shape
from tunesmith.models.family import LLAMA_PLAN, DecoderConfig, Family
from tunesmith.models.qwen2.family import read_windows
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, {"head_dim": 128})
    fields = read_shape(reader)
    bias = reader.take("attention_bias", default=False)
    config = DecoderConfig(
        **fields,
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm="per_head",
        rope=read_rope(reader),
        layer_windows=read_windows(reader, fields["num_hidden_layers"]),
    )
    reader.finish()
    return config


PER_HEAD_PLAN = {
    **LLAMA_PLAN,
    "model.layers.*.self_attn.q_norm": "per_head",
    "model.layers.*.self_attn.k_norm": "per_head",
}

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_TIED = {**_QWEN3, "tie_word_embeddings": True}

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read_config=read_config,
    tp_plan=PER_HEAD_PLAN,
    weights=ROTARY_BUFFERS,
    chat_templates=("qwen3",),
    sizes={
        "qwen3/0.6B": shape(_TIED, 1024, 3072, 28, 16, 8),
        "qwen3/1.7B": shape(_TIED, 2048, 6144, 28, 16, 8),
        "qwen3/4B": shape(_TIED, 2560, 9728, 36, 32, 8),
        "qwen3/8B": shape(_QWEN3, 4096, 12288, 36, 32, 8),
        "qwen3/14B": shape(_QWEN3, 5120, 17408, 40, 40, 8),
        "qwen3/32B": shape(_QWEN3, 5120, 25600, 64, 64, 8),
    },
    repositories={f"qwen3/{size}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
)
