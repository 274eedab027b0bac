"""Gemma 3, text: Gemma 2's layers with norms on queries and keys instead of soft caps, windows on five layers of six,
and rotary positions of their own for those. Repositories that see images too are read as their text tower."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import UserError
from tunesmith.models.config_json import ConfigJson, checked, layer_windows, rope_config
from tunesmith.models.family import DecoderConfig, Family, RopeConfig
from tunesmith.models.gemma.family import COMMON, gemma_fields
from tunesmith.models.qwen3.family import PER_HEAD_PLAN
from tunesmith.models.sizes import shape
from tunesmith.models.weights import Alias, Drop

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""What a text_config leaves out has these values; the published ones leave out most."""


def read_config(hf: dict[str, Any]) -> DecoderConfig:
    reader = ConfigJson(hf, DEFAULTS)
    reader.wants_nothing_of("hidden_act")
    fields = gemma_fields(reader)
    types = _layer_types(reader, fields["num_hidden_layers"])
    rope, local = _ropes(reader)
    config = DecoderConfig(
        **fields,
        qk_norm="per_head",
        rope=rope,
        local_rope=local,
        attention_scale=reader.take("query_pre_attn_scalar") ** -0.5,
        final_logit_softcap=reader.take("final_logit_softcapping"),
        layer_windows=layer_windows(types, reader.take("sliding_window"), fields["num_hidden_layers"]),
    )
    reader.finish()
    return config


def _layer_types(reader: ConfigJson, num_layers: int) -> list[str]:
    period = reader.take("sliding_window_pattern", "_sliding_window_pattern", default=6)
    usual = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(num_layers)]
    return reader.take("layer_types", default=usual)


def _ropes(reader: ConfigJson) -> tuple[RopeConfig, RopeConfig]:
    """Those of layers that see all, and those of layers with a window; only the former are stretched."""
    parameters = reader.take("rope_parameters", default={})
    unknown = set(parameters) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"config.json: `rope_parameters` of Gemma 3 has no {sorted(unknown)[0]!r} that is understood")
    own = {key: checked(key, value) for key, value in parameters.items() if value is not None}
    everywhere = {**own.get("full_attention", {}), **reader.take("rope_scaling", default={})}
    theta, local_theta = reader.take("rope_theta", default=1e6), reader.take("rope_local_base_freq", default=1e4)
    local = own.get("sliding_attention", {})
    return rope_config(reader, everywhere, theta), rope_config(reader, local, local_theta)


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a repository's, complete; a text model's own is left as it is."""
    if "text_config" not in hf:
        return dict(hf)
    checked("text_config", hf["text_config"])
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "initializer_range")
    return {
        **DEFAULTS,
        **{key: hf[key] for key in outer if hf.get(key) is not None},
        **hf["text_config"],
        **{key: hf[key] for key in ("eos_token_id",) if hf.get(key) is not None},
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
    }


_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    **COMMON,
    "vocab_size": 262144,
    "head_dim": 256,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "eos_token_id": [1, 106],
}
_LARGE = {
    **_GEMMA3,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    read_config=read_config,
    model="tunesmith.models.gemma2.model:SandwichLM",
    tp_plan=PER_HEAD_PLAN,
    weights=(
        *(Drop(f"{prefix}{part}.*") for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")),
        Alias("language_model.model.*", "model.*"),
        Alias("language_model.lm_head.*", "lm_head.*"),
        Alias("model.language_model.*", "model.*"),
    ),
    classifiers=("Gemma3TextForSequenceClassification", "Gemma3TextForTokenClassification"),
    unloadable=("Gemma3TextForTokenClassification",),
    text_config=text_config,
    chat_templates=("gemma",),
    sizes={
        "gemma3/270M": shape({**_GEMMA3, "eos_token_id": 1}, 640, 2048, 18, 4, 1),
        "gemma3/1B": shape(_GEMMA3, 1152, 6912, 26, 4, 1),
        "gemma3/4B": shape(_LARGE, 2560, 10240, 34, 8, 4),
        "gemma3/12B": shape(_LARGE, 3840, 15360, 48, 16, 8),
        "gemma3/27B": shape({**_LARGE, "query_pre_attn_scalar": 168}, 5376, 21504, 62, 32, 16, head_dim=128),
    },
    repositories={f"gemma3/{size}": f"google/gemma-3-{size.lower()}-it" for size in ("270M", "1B", "4B", "12B", "27B")},
)
