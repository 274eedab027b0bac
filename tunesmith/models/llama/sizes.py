"""Named sizes of the Llama shape, as config.json."""

from __future__ import annotations

from typing import Any

from tunesmith.models.sizes import shape

_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CODE_LLAMA = {**_LLAMA2, "vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1000000.0}
_LLAMA3 = {
    **_LLAMA2,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}


def _stretched(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    return {
        **_LLAMA3,
        "max_position_embeddings": 131072,
        "rope_scaling": rope,
        "eos_token_id": [128001, 128008, 128009],
    }


_LLAMA3_1 = _stretched(8.0)
_LLAMA3_2 = {**_stretched(32.0), "tie_word_embeddings": True}
_SMOLLM2 = {
    **_LLAMA2,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

SIZES = {
    "llama2/7B": shape(_LLAMA2, 4096, 11008, 32, 32, 32),
    "llama2/13B": shape(_LLAMA2, 5120, 13824, 40, 40, 40),
    "llama2/70B": shape(_LLAMA2, 8192, 28672, 80, 64, 8),
    "code_llama2/7B": shape(_CODE_LLAMA, 4096, 11008, 32, 32, 32),
    "code_llama2/13B": shape(_CODE_LLAMA, 5120, 13824, 40, 40, 40),
    "code_llama2/34B": shape({**_CODE_LLAMA, "vocab_size": 32000}, 8192, 22016, 48, 64, 8),
    "code_llama2/70B": shape(_CODE_LLAMA, 8192, 28672, 80, 64, 8),
    "llama3/8B": shape(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama3/70B": shape(_LLAMA3, 8192, 28672, 80, 64, 8),
    "llama3_1/8B": shape(_LLAMA3_1, 4096, 14336, 32, 32, 8),
    "llama3_1/70B": shape(_LLAMA3_1, 8192, 28672, 80, 64, 8),
    "llama3_1/405B": shape(_LLAMA3_1, 16384, 53248, 126, 128, 8),
    "llama3_2/1B": shape(_LLAMA3_2, 2048, 8192, 16, 32, 8, head_dim=64),
    "llama3_2/3B": shape(_LLAMA3_2, 3072, 8192, 28, 24, 8, head_dim=128),
    "llama3_3/70B": shape(_LLAMA3_1, 8192, 28672, 80, 64, 8),
    "smollm2/135M": shape({**_SMOLLM2, "initializer_range": 1 / 24}, 576, 1536, 30, 9, 3),
    "smollm2/360M": shape(_SMOLLM2, 960, 2560, 32, 15, 5),
    "smollm2/1.7B": shape({**_SMOLLM2, "rope_theta": 130000.0}, 2048, 8192, 24, 32, 32),
}

REPOSITORIES = {
    "llama2/7B": "meta-llama/Llama-2-7b-hf",
    "llama2/13B": "meta-llama/Llama-2-13b-hf",
    "llama2/70B": "meta-llama/Llama-2-70b-hf",
    "code_llama2/7B": "codellama/CodeLlama-7b-hf",
    "code_llama2/13B": "codellama/CodeLlama-13b-hf",
    "code_llama2/34B": "codellama/CodeLlama-34b-hf",
    "code_llama2/70B": "codellama/CodeLlama-70b-hf",
    "llama3/8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3/70B": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3_1/8B": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "llama3_1/70B": "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "llama3_1/405B": "meta-llama/Meta-Llama-3.1-405B-Instruct",
    "llama3_2/1B": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2/3B": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3_3/70B": "meta-llama/Llama-3.3-70B-Instruct",
    "smollm2/135M": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2/360M": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2/1.7B": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
