"""What llama.cpp calls a family, and what it computes for it: shapes that it would compute otherwise are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import UserError
from tunesmith.models.family import DecoderConfig
from tunesmith.nn.config import RopeConfig
from tunesmith.nn.rope import attention_factor, inverse_frequencies

NO_CAP = 1e6
"""A soft cap that changes no digit of a float32: architectures that always have one can't be told of none."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as far as it serves a family of ours."""

    name: str
    rotates_neighbours: bool = False
    """Features (0, 1), (2, 3), … of a head are rotated together, not i with i + K/2: rows of queries and keys are reordered."""
    activation: str = "silu"
    has_windows: bool = False
    """Whether it computes sliding windows, layer by layer."""
    has_out_bias: bool = False
    """Biases on the attention's output and in the feed-forward."""
    square: bool = False
    """Heads times their size must be the hidden size."""
    head: str = "any"
    """any: its own or tied; tied: always the embedding; own: never."""
    factors: bool = False
    """Whether it reads a factor for each rotary frequency from a tensor."""


ARCHITECTURES = {
    "llama": Architecture("llama", rotates_neighbours=True, has_out_bias=True, factors=True),
    "mistral": Architecture("llama", rotates_neighbours=True, has_out_bias=True, factors=True),
    "qwen2": Architecture("qwen2", square=True),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", activation="gelu_pytorch_tanh", head="tied"),
    "gemma2": Architecture("gemma2", activation="gelu_pytorch_tanh", has_windows=True, head="tied"),
    "gemma3": Architecture("gemma3", activation="gelu_pytorch_tanh", has_windows=True),
    "phi3": Architecture("phi3", square=True, factors=True),
    "olmo2": Architecture("olmo2", square=True, head="own"),
}
"""Our family -> llama.cpp's architecture."""


def find_architecture(family: str, config: DecoderConfig, head_is_own: bool) -> Architecture:
    """Raises UserError, naming the number, where llama.cpp has none for the family or computes something else for this shape.

    head_is_own: whether the written model's output layer is not the embedding.
    """
    if family not in ARCHITECTURES:
        raise UserError(f"GGUF has no architecture for {family}; there are some for {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[family]
    for problem in _problems(architecture, config, head_is_own):
        raise UserError(
            f"llama.cpp's {architecture.name} can't compute this model: {problem}; export it as safetensors"
        )
    return architecture


def _problems(architecture: Architecture, config: DecoderConfig, head_is_own: bool) -> Iterator[str]:
    activation = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}.get(config.hidden_act, config.hidden_act)
    if activation != architecture.activation:
        yield f"its `hidden_act` is {config.hidden_act}, there it is always {architecture.activation}"
    if not architecture.has_out_bias and (config.attention_out_bias or config.mlp_bias):
        yield "it has biases on the attention's output or in the feed-forward, there is no place for them"
    if architecture.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        yield f"its heads are {config.head_dim} wide, there `hidden_size` is always the heads' widths together"
    if architecture.head == "tied" and head_is_own:
        yield "its output layer has weights of its own, there it is always the embedding"
    partial = config.rope.partial_rotary_factor
    if partial != 1 and architecture.name != "phi3":
        yield f"its `partial_rotary_factor` is {partial}, there all features rotate"
    if architecture.name in ("gemma2", "gemma3"):
        usual = _usual_scale(architecture.name, config)
        if config.attention_scale is not None and abs(config.attention_scale / usual - 1) > 1e-6:
            yield (
                f"its `query_pre_attn_scalar` is {config.attention_scale**-2:.6g}, there it is always {usual**-2:.6g} for this shape"
            )
    local = config.local_rope
    if local is not None and local.kind != "default" and any(config.layer_windows):
        yield f"its windowed layers have rotary positions of type {local.kind}, there they have plain ones"


def _usual_scale(name: str, config: DecoderConfig) -> float:
    """The factor of attention scores that llama.cpp takes: it knows the largest model by its number of layers."""
    is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[name]
    return (config.hidden_size // config.num_attention_heads if is_27b else config.head_dim) ** -0.5


def context_length(architecture: Architecture, config: DecoderConfig) -> tuple[int, str | None]:
    """How many tokens llama.cpp computes as we do, and why not as many as the model takes (None: it does)."""
    whole = config.context_length
    windows = [window for window in config.layer_windows if window is not None]
    if windows and not architecture.has_windows and min(windows) < whole:
        return min(windows), f"llama.cpp's {architecture.name} has no sliding windows"
    if config.rope.kind == "dynamic" and config.rope.max_position_embeddings < whole:
        return config.rope.max_position_embeddings, "llama.cpp has no rotary positions that change with the length"
    return whole, None


def add_shape(writer: Any, architecture: Architecture, config: DecoderConfig) -> None:
    """Write the numbers that shape the model, but those of rotary positions, as metadata."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(architecture, config)[0])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    windows = [window for window in config.layer_windows if window is not None]
    if windows and architecture.has_windows:
        writer.add_sliding_window(windows[0])
        writer.add_sliding_window_pattern([window is not None for window in config.layer_windows])
    if architecture.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap or NO_CAP)
        writer.add_final_logit_softcapping(config.final_logit_softcap or NO_CAP)
        if not windows:
            writer.add_sliding_window(config.context_length)
    elif config.final_logit_softcap:
        writer.add_final_logit_softcapping(config.final_logit_softcap)


def add_rope(writer: Any, architecture: Architecture, config: DecoderConfig) -> dict[str, list[float]]:
    """Write the rotary positions as metadata; return {tensor: a factor for each frequency} of what is written as tensors.

    Raises UserError for a kind that this architecture does not compute.
    """
    from gguf import RopeScalingType

    rope, dim = config.rope, int(config.head_dim * config.rope.partial_rotary_factor)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope.theta)
    if config.local_rope is not None:
        writer.add_rope_freq_base_swa(config.local_rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn" and _is_plain_yarn(rope):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(
            attention_factor(rope) / attention_factor(RopeConfig("yarn", factor=rope.factor))
        )
    elif rope.kind in ("llama3", "yarn", "longrope"):
        if not architecture.factors or (rope.kind == "longrope") != (architecture.name == "phi3"):
            raise UserError(
                f"llama.cpp's {architecture.name} can't compute rotary positions of type {rope.kind} with these numbers: export it as safetensors"
            )
        writer.add_rope_scaling_attn_factors(attention_factor(rope))
        if rope.kind == "longrope":
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
            return {
                "rope_factors_long.weight": list(rope.long_factor),
                "rope_factors_short.weight": list(rope.short_factor),
            }
        plain = inverse_frequencies(RopeConfig(theta=rope.theta), dim)
        return {"rope_freqs.weight": (plain / inverse_frequencies(rope, dim)).tolist()}
    return {}


def _is_plain_yarn(rope: RopeConfig) -> bool:
    """Whether the numbers that llama.cpp does not read are those that it takes."""
    return rope.truncate and (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)
