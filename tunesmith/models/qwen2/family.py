"""Qwen2 and Qwen2.5: Llama's shape with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from tunesmith.models.config_json import ConfigJson, layer_windows, read_rope, read_shape
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.models.sizes import shape
from tunesmith.models.weights import ROTARY_BUFFERS


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf)
    fields = read_shape(reader)
    windows = read_windows(reader, fields["num_hidden_layers"])
    config = DecoderConfig(**fields, attention_bias=True, rope=read_rope(reader), layer_windows=windows)
    reader.finish()
    return config


def read_windows(reader: ConfigJson, num_layers: int) -> tuple[int | None, ...]:
    """A window on all layers from `max_window_layers` on, or as `layer_types` says, and only if `use_sliding_window`."""
    window = reader.take_or_null("sliding_window", default=4096)
    first = reader.take("max_window_layers", default=28)
    if not reader.take("use_sliding_window", default=False):
        window = None
    usual = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return layer_windows(reader.take("layer_types", default=usual), window, num_layers)


_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_TIED = {**_QWEN2, "tie_word_embeddings": True}
_LARGE = {**_QWEN2, "vocab_size": 152064}

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read_config=read_config,
    weights=ROTARY_BUFFERS,
    chat_templates=("qwen2_5",),
    sizes={
        "qwen2/0.5B": shape(_TIED, 896, 4864, 24, 14, 2),
        "qwen2/1.5B": shape(_TIED, 1536, 8960, 28, 12, 2),
        "qwen2/7B": shape(_LARGE, 3584, 18944, 28, 28, 4),
        "qwen2_5/0.5B": shape(_TIED, 896, 4864, 24, 14, 2),
        "qwen2_5/1.5B": shape(_TIED, 1536, 8960, 28, 12, 2),
        "qwen2_5/3B": shape(_TIED, 2048, 11008, 36, 16, 2),
        "qwen2_5/7B": shape(_LARGE, 3584, 18944, 28, 28, 4),
        "qwen2_5/14B": shape(_LARGE, 5120, 13824, 48, 40, 8),
        "qwen2_5/32B": shape(_LARGE, 5120, 27648, 64, 40, 8),
        "qwen2_5/72B": shape(_LARGE, 8192, 29568, 80, 64, 8),
    },
    repositories={
        "qwen2/0.5B": "Qwen/Qwen2-0.5B-Instruct",
        "qwen2/1.5B": "Qwen/Qwen2-1.5B-Instruct",
        "qwen2/7B": "Qwen/Qwen2-7B-Instruct",
        "qwen2_5/0.5B": "Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2_5/1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
        "qwen2_5/3B": "Qwen/Qwen2.5-3B-Instruct",
        "qwen2_5/7B": "Qwen/Qwen2.5-7B-Instruct",
        "qwen2_5/14B": "Qwen/Qwen2.5-14B-Instruct",
        "qwen2_5/32B": "Qwen/Qwen2.5-32B-Instruct",
        "qwen2_5/72B": "Qwen/Qwen2.5-72B-Instruct",
    },
)
