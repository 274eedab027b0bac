"""Meta's own layout of Llama checkpoints: params.json and consolidated.*.pth, as in the `original` folder of their repositories.

D hidden, H heads, K head size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.tensor_files import HeldTensor, StoredTensor, load_torch_file
from tunesmith.errors import UserError

_NAMES = {
    r"tok_embeddings\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.attention\.w([qkvo])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w1\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w2\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w3\.weight": r"model.layers.\1.mlp.up_proj.weight",
}

# Llama 3.2's 1B and 3B stretch their context by 32, all other Llamas with scaled rope by 8; params.json says neither.
_SMALL_LLAMA_3_2 = {2048, 3072}


def is_meta_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint in Meta's layout (and none in Hugging Face's, which would be preferred)."""
    folder = Path(folder)
    return (folder / "params.json").is_file() and bool(_shard_paths(folder)) and not (folder / "config.json").is_file()


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.*.pth"))


def read_config(folder: str | Path) -> dict[str, Any]:
    """What config.json would say of the checkpoint in `folder`. Raises UserError where params.json is broken or lacks a number."""
    folder = Path(folder)
    params = _read_params(folder)
    shards = _read_shards(folder)
    hidden, heads = params["dim"], params["n_heads"]
    embedding = shards[0]["tok_embeddings.weight"]
    vocab_size = params.get("vocab_size", -1)
    if vocab_size <= 0:  # Llama 2 leaves it to the tokenizer; its embedding is cut along D
        vocab_size = embedding.shape[0] * (1 if embedding.shape[1] * len(shards) == hidden else len(shards))
    is_llama_3 = vocab_size >= 128_000
    scaled = params.get("use_scaled_rope", False)
    theta = params.get("rope_theta", 10000.0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(shards),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab_size,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(params) if scaled else None,
        "max_position_embeddings": _context(params, is_llama_3, scaled, theta),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": _is_tied(shards),
        "bos_token_id": 128_000 if is_llama_3 else 1,
        "eos_token_id": 128_001 if is_llama_3 else 2,
        "initializer_range": 0.02,
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }
    stated = feed_forward_size(hidden, params.get("multiple_of", 256), params.get("ffn_dim_multiplier"))
    if config["intermediate_size"] != stated:
        raise UserError(
            f"{folder / 'params.json'} describes a feed-forward size of {stated}, but the weights have {config['intermediate_size']}: "
            f"a consolidated.*.pth file is missing (there are {len(shards)}), or the files don't belong together"
        )
    return config


def feed_forward_size(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of 4 D, times the multiplier, rounded up to a multiple (llama/model.py, FeedForward)."""
    size = int(2 * 4 * hidden / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return -(-size // multiple_of) * multiple_of


def _rope_scaling(params: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": params.get("rope_scaling_factor", 32.0 if params["dim"] in _SMALL_LLAMA_3_2 else 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }


def _context(params: dict[str, Any], is_llama_3: bool, scaled: bool, theta: float) -> int:
    if scaled:
        return 131_072
    if is_llama_3:
        return 8192
    return params.get("max_seq_len", 16_384 if theta == 1e6 else 4096)  # Code Llama, Llama 2


def _is_tied(shards: list[dict[str, Tensor]]) -> bool:
    """Whether the output layer is the embedding: absent, or stored a second time."""
    output, embedding = shards[0].get("output.weight"), shards[0]["tok_embeddings.weight"]
    return output is None or (len(shards) == 1 and torch.equal(output, embedding))


def read_weights(folder: str | Path) -> dict[str, StoredTensor]:
    """{Hugging Face's name: tensor}, put together from the shards and brought to Hugging Face's rope layout as it is asked for.

    Raises UserError for a broken file, or a tensor that no Llama has.
    """
    folder = Path(folder)
    params, shards = _read_params(folder), _read_shards(folder)
    path = _shard_paths(folder)[0]
    heads = {"q": params["n_heads"], "k": params.get("n_kv_heads") or params["n_heads"]}
    found = {}
    for name in shards[0]:
        if name == "rope.freqs":
            continue
        target = hf_name(name, path)
        pieces = [shard[name] for shard in shards]
        dim = _cut_along(name, pieces, params["dim"])
        shape = list(pieces[0].shape)
        if dim is not None:
            shape[dim] *= len(pieces)
        rotated = re.search(r"self_attn\.([qk])_proj", target)
        make = _maker(pieces, dim, heads[rotated[1]] if rotated else None)
        found[target] = HeldTensor(path, name, pieces[0].dtype, torch.Size(shape), make)
    return found


def _maker(pieces: list[Tensor], dim: int | None, heads: int | None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        whole = pieces[0] if dim is None else torch.cat(pieces, dim)
        return whole if heads is None else half_split(whole, heads)

    return make


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows (H·K, D) of a query or key projection from Meta's rope layout to Hugging Face's.

    Meta rotates neighbours (0, 1), (2, 3), …; Hugging Face rotates i with i + K/2. The same rows in the other order give the same attention.
    """
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, -1).transpose(1, 2).reshape(weight.shape)


def hf_name(name: str, path: Path) -> str:
    """Hugging Face's name of a tensor that Meta (and torchtitan) calls `name`. Raises UserError for one that no Llama has."""
    for pattern, replacement in _NAMES.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    raise UserError(f"{path} holds {name}, which a Llama in Meta's layout doesn't have: get the model as safetensors")


def _cut_along(name: str, pieces: list[Tensor], hidden: int) -> int | None:
    """The dim along which tensor-parallel shards were cut; None: every shard has the whole."""
    if len(pieces) == 1 or name.endswith("norm.weight"):
        return None
    if name == "tok_embeddings.weight":  # Llama 2 cuts D, Llama 3 the vocabulary
        return 0 if pieces[0].shape[1] == hidden else 1
    return 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    try:
        params = json.loads(path.read_text())
        missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in params]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read: download it again") from error
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: is it the params.json of a Llama?")
    return params


def _read_shards(folder: Path) -> list[dict[str, Tensor]]:
    paths = _shard_paths(folder)
    if not paths:
        raise UserError(f"{folder} holds no consolidated.*.pth file")
    shards = [load_torch_file(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        lost = sorted(shards[0].keys() ^ shard.keys())
        if lost or "tok_embeddings.weight" not in shard:
            raise UserError(
                f"{path} lacks {lost[0] if lost else 'tok_embeddings.weight'}: the files don't belong together; download them again"
            )
    return shards
