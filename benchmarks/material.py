"""What the benchmarks work on, made from what every Python installation carries: texts, chats, a tokenizer, random models."""

from __future__ import annotations

import ast
import functools
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Its {% generation %} marks are what transformers and TRL need to find the answers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMALL = {  # 26 million parameters
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
HALF_BILLION = {
    "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip


@functools.cache
def docstrings() -> list[tuple[str, str, str]]:
    """(name, signature line, docstring) of what the standard library documents."""
    return list(_docstrings())


def _docstrings() -> Iterator[tuple[str, str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"} & set(parts):
            continue
        try:
            source = path.read_text()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                if text.isascii() and len(text) > 20:
                    yield f"{'.'.join(parts)}.{node.name}", lines[node.lineno - 1].strip(), text


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three questions; answers are mostly short, some long."""
    entries, order = docstrings(), random.Random(0)
    rows = []
    for _ in range(count):
        messages = [{"role": "system", "content": "You know Python."}] if order.random() < 0.3 else []
        for name, signature, text in order.sample(entries, order.choice([1, 1, 1, 2, 3])):
            messages.append({"role": "user", "content": f"What does `{name}` do? It begins with `{signature}`."})
            messages.append({"role": "assistant", "content": text[:1500]})
        rows.append({"messages": messages})
    return rows


def texts(count: int) -> list[dict[str, str]]:
    """Plain documents: the same content without roles."""
    return [{"text": "\n\n".join(message["content"] for message in row["messages"])} for row in chats(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    """A question, what the documentation answers, and what it says of something else."""
    entries, order = docstrings(), random.Random(1)
    rows = []
    for _ in range(count):
        (name, signature, text), (_, _, other) = order.sample(entries, 2)
        question = {"role": "user", "content": f"What does `{name}` do? It begins with `{signature}`."}
        chosen, rejected = ({"role": "assistant", "content": one[:900]} for one in (text, other))
        rows.append({"prompt": [question], "chosen": [chosen], "rejected": [rejected]})
    return rows


def marked(count: int) -> list[dict[str, Any]]:
    """The same answers one by one, marked good or bad."""
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen" if number % 2 else "rejected"],
            "label": bool(number % 2),
        }
        for number, pair in enumerate(pairs(count))
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path, vocab_size: int = 8192) -> Path:
    """A byte-level BPE tokenizer trained on those texts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f"{line}\n{text}" for _, line, text in docstrings()), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def write_model(folder: Path, shape: dict[str, Any], dtype: str = "float32") -> Path:
    """A Llama of random weights as a repository; written without either library."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim", hidden // heads)
    tied = shape.get("tie_word_embeddings", False)
    shapes = {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        of_layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (groups * size, hidden),
            "self_attn.v_proj": (groups * size, hidden), "self_attn.o_proj": (hidden, heads * size),
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": dims for name, dims in of_layer.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(dims, dtype=getattr(torch, dtype))
        if len(dims) == 1
        else torch.empty(dims, dtype=getattr(torch, dtype)).normal_(0, 0.02, generator=generator)
        for name, dims in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "initializer_range": 0.02, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False, "head_dim": size,
        "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": tied, "torch_dtype": dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | shape))
    return folder
