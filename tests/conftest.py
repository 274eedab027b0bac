"""Fixtures for all tests. Nothing here needs a network."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real tokenizers, a real tiny model and real data; tests that use them skip where they are absent."""
    folder = Path(os.environ.get("TUNESMITH_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip("the folder of real tokenizers, models and data is not here")
    return folder


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model repository: a random two-layer Llama in float32, a small byte-level BPE tokenizer, a ChatML template."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog user assistant answer question"] * 8, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "chat_template": CHATML,
            }
        )
    )
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    generator = torch.Generator().manual_seed(0)
    d, f, v = 64, 128, 320
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {name + "input_layernorm.weight": (d,), name + "post_attention_layernorm.weight": (d,)}
        shapes |= {name + "self_attn.q_proj.weight": (d, d), name + "self_attn.o_proj.weight": (d, d)}
        shapes |= {name + f"self_attn.{p}_proj.weight": (d // 2, d) for p in "kv"}
        shapes |= {
            name + "mlp.gate_proj.weight": (f, d),
            name + "mlp.up_proj.weight": (f, d),
            name + "mlp.down_proj.weight": (d, f),
        }
    tensors = {
        n: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * 0.08 for n, s in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    """24 short conversations of different lengths as jsonl."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    words = "the quick brown fox jumps over lazy dog".split()
    rows = []
    for i in range(24):
        question = " ".join(words[(i * 3 + j) % 8] for j in range(1 + i % 7))
        answer = " ".join(words[(i * 5 + j) % 8] for j in range(1 + (i * 2) % 5))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tokenized rows of tests are not left in the user's cache."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
