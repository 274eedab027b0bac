"""Tiny models of every family, made with transformers, and the same in tunesmith."""

import json

import pytest
import torch

from tunesmith.models.decoder import build
from tunesmith.models.families import find_family
from tunesmith.models.weights import model_name

TINY = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(
    rope_type="longrope", short_factor=[1.0 + i / 16 for i in range(8)], long_factor=[2.0 + i for i in range(8)]
)

CASES = {
    "llama": dict(),
    "llama mha biased": dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama mqa tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "llama wide heads": dict(head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "llama linear": dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4)),
    "llama llama3": dict(rope_parameters=dict(**LLAMA3, rope_theta=5e5, original_max_position_embeddings=16)),
    "llama dynamic": dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "llama dynamic beyond": dict(
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4), max_position_embeddings=24
    ),
    "llama yarn": dict(
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16)
    ),
    "llama yarn scaled": dict(
        rope_parameters=dict(
            rope_type="yarn",
            factor=4.0,
            rope_theta=1e4,
            original_max_position_embeddings=16,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        )
    ),
    "mistral": dict(sliding_window=None),
    "mistral window": dict(sliding_window=7, num_key_value_heads=1),
    "qwen2": dict(),
    "qwen2 tied windows": dict(
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=6, max_window_layers=1, num_key_value_heads=4
    ),
    "qwen2 yarn": dict(
        rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e6, original_max_position_embeddings=32)
    ),
    "qwen3": dict(head_dim=32),
    "qwen3 tied biased windows": dict(
        tie_word_embeddings=True, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma": dict(head_dim=32),
    "gemma mqa untied": dict(num_key_value_heads=1, tie_word_embeddings=False),
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma2 no caps": dict(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    "gemma2 wide window": dict(num_key_value_heads=4, attn_logit_softcapping=5.0),
    "gemma3_text": dict(num_hidden_layers=3, sliding_window=6, sliding_window_pattern=3, query_pre_attn_scalar=24),
    "gemma3_text stretched": dict(
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
    "phi3": dict(head_dim=None, sliding_window=9),
    "phi3 partial tied": dict(head_dim=None, tie_word_embeddings=True, partial_rotary_factor=0.75),
    "phi3 longrope short": dict(
        head_dim=None, rope_parameters=dict(**LONG, rope_theta=1e4), original_max_position_embeddings=48
    ),
    "phi3 longrope long": dict(
        head_dim=None, rope_parameters=dict(**LONG, rope_theta=1e4), original_max_position_embeddings=16
    ),
    "olmo2": dict(),
    "olmo2 mha biased tied": dict(num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
}
"""Case -> what sets it apart from TINY; the first word is transformers' model type."""


def make_reference(case: str, dtype: torch.dtype = torch.float32, **more):
    """A transformers model with random weights, biases and norms, its attention in plain arithmetic."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kwargs = {**TINY, **CASES[case], **more}
    kwargs = {key: value for key, value in kwargs.items() if not (key == "head_dim" and value is None)}
    config = AutoConfig.for_model(case.split()[0], **kwargs)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return reference.to(dtype)


def config_json(reference) -> dict:
    """What transformers writes to config.json."""
    config = json.loads(reference.config.to_json_string())
    return {**config, "architectures": [type(reference).__name__]}


def build_empty(hf: dict, dtype: torch.dtype = torch.float32):
    family = find_family(hf, "config.json")
    hf = family.text_config(hf)
    with torch.device("meta"):
        model = build(hf, family, family.read_config(hf)).to(dtype)
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    return model


def take_weights(model, state: dict) -> None:
    """Give a model the tensors of a file, through the family's operators; every name must be found."""
    renamed = {model_name(model.weights, name): tensor for name, tensor in state.items()}
    renamed.pop(None, None)
    model.load_state_dict(renamed, strict=True)


def pair(case: str, dtype: torch.dtype = torch.float32, **more):
    """(transformers' model, ours) with the same weights."""
    reference = make_reference(case, dtype, **more)
    model = build_empty(config_json(reference), dtype)
    take_weights(model, reference.state_dict())
    return reference, model


def tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch_size, length), generator=torch.Generator().manual_seed(seed))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param
