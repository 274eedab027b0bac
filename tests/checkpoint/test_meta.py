"""Meta's layout gives the logits of the Hugging Face model it was made from."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.checkpoint import hf, meta
from tunesmith.checkpoint.check import probe_ids, probe_logits
from tunesmith.checkpoint.hf import load_weights
from tunesmith.errors import UserError
from tunesmith.models.decoder import build


def make_model(tied: bool = False, **changes) -> LlamaForCausalLM:
    config = LlamaConfig(**{
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": tied, "initializer_range": 0.1, "rms_norm_eps": 1e-5, **changes,
    })  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in Meta's rope order: what the reader has to undo."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_meta(
    model: LlamaForCausalLM,
    folder,
    shards: int = 1,
    params=None,
    cut_vocabulary: bool = False,
    drop_output: bool = False,
) -> None:
    """Write `model` as Meta would, over so many tensor-parallel ranks."""
    config = model.config
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
    }
    names |= {f"{letter}_proj": f"w{letter}" for letter in "qkvo"} | {"self_attn": "attention", "mlp": "feed_forward"}
    whole = {"rope.freqs": torch.ones(8)}
    for name, tensor in model.state_dict().items():
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{letter}_proj" in name:
                tensor = interleave(tensor, heads)
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        whole[".".join(names.get(piece, piece) for piece in name.split("."))] = tensor
    if drop_output:
        del whole["output.weight"]
    along = {"wo": 1, "w2": 1, "tok_embeddings": 0 if cut_vocabulary else 1}
    for rank in range(shards):
        part = {
            name: tensor
            if "norm" in name or "rope" in name
            else tensor.chunk(shards, along.get(name.split(".")[-2], 0))[rank].clone()
            for name, tensor in whole.items()
        }
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    stated = {
        "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 96, "multiple_of": 64, "rope_theta": 10000.0,
        "ffn_dim_multiplier": 1.0,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(stated | (params or {})))


def load(folder):
    hf_config, family, config = hf.read_model_config(folder)
    with torch.device("meta"):
        model = build(hf_config, family, config)
    load_weights(model, folder)
    model.init_buffers("cpu")
    return model.eval()


def assert_same(folder, theirs):
    with torch.no_grad():
        expected = theirs(probe_ids(96)).logits
    ours = probe_logits(load(folder))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("cut_vocabulary", [False, True])
@pytest.mark.parametrize("vocab_size", [96, -1])
def test_logits(tmp_path, shards, cut_vocabulary, vocab_size):
    theirs = make_model()
    write_meta(theirs, tmp_path, shards, {"vocab_size": vocab_size}, cut_vocabulary)
    assert meta.is_meta_folder(tmp_path)
    assert_same(tmp_path, theirs)


@pytest.mark.parametrize("drop_output", [False, True])
def test_tied_head(tmp_path, drop_output):
    theirs = make_model(tied=True)
    write_meta(theirs, tmp_path, drop_output=drop_output)
    assert meta.read_config(tmp_path)["tie_word_embeddings"]
    assert_same(tmp_path, theirs)


def test_scaled_rope(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = make_model(rope_parameters={**scaling, "rope_theta": 500000.0}, max_position_embeddings=131072)
    write_meta(theirs, tmp_path, params={"use_scaled_rope": True, "rope_theta": 500000.0})
    assert meta.read_config(tmp_path)["rope_scaling"] == scaling
    assert_same(tmp_path, theirs)


# hidden size, multiple_of, ffn_dim_multiplier -> intermediate_size, from the released models' params.json and config.json
RELEASED = [
    (4096, 256, None, 11008),
    (5120, 256, None, 13824),
    (8192, 4096, 1.3, 28672),
    (4096, 1024, 1.3, 14336),
    (2048, 256, 1.5, 8192),
    (3072, 256, 1.0, 8192),
]


@pytest.mark.parametrize("hidden, multiple_of, multiplier, expected", RELEASED)
def test_feed_forward_sizes_of_released_models(hidden, multiple_of, multiplier, expected):
    assert meta.feed_forward_size(hidden, multiple_of, multiplier) == expected


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="params.json can't be read"):
        meta.read_config(tmp_path)
    write_meta(make_model(), tmp_path, shards=2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(
        UserError, match=r"feed-forward size of 192, but the weights have 96: a consolidated.\*.pth file is missing"
    ):
        meta.read_config(tmp_path)
    write_meta(make_model(), tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes((tmp_path / "consolidated.00.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="consolidated.00.pth is no whole PyTorch file"):
        meta.read_config(tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="consolidated.00.pth is no whole PyTorch file"):
        meta.read_config(tmp_path)
    (tmp_path / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        meta.read_config(tmp_path)
    torch.save(
        {"tok_embeddings.weight": torch.ones(96, 64), "strange": torch.ones(1)}, tmp_path / "consolidated.00.pth"
    )
    with pytest.raises(UserError, match="holds strange"):
        meta.read_weights(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 64}')
    with pytest.raises(UserError, match="lacks n_layers, n_heads, norm_eps"):
        meta.read_config(tmp_path)


def test_hugging_face_layout_is_preferred(tmp_path):
    theirs = make_model()
    write_meta(theirs, tmp_path)
    theirs.save_pretrained(tmp_path)
    assert not meta.is_meta_folder(tmp_path)
    assert_same(tmp_path, theirs)
