"""Peak memory of exports, measured in a process of their own: a shard or so, not the model."""

import json
import subprocess
import sys

import pytest
import torch

from tests.export.conftest import gpt2
from tests.recipes.test_export import make_adapter
from tunesmith.checkpoint.write import Outgoing, write_tensors

SHARD = 64e6
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16,
    "max_position_embeddings": 512, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

MEASURED = """
import sys, resource
from tunesmith.configs.export import Export
from tunesmith.recipes import export
import tunesmith.export.repository, tunesmith.export.gguf.write, tunesmith.models.llama.family, gguf.quants

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
export.main(Export(**eval(sys.argv[1])))
print("PEAK", status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """468 MB in eight files."""
    folder = tmp_path_factory.mktemp("large")
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {name: (SHAPE["vocab_size"], hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}

    def make(shape):
        return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02

    tensors = {name: Outgoing(torch.Size(shape), torch.float32, make(shape)) for name, shape in shapes.items()}
    write_tensors(tensors, folder, "model", SHARD)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return gpt2(folder)


def peak(**options) -> int:
    """Bytes above what the process had before, at most."""
    command = [sys.executable, "-c", MEASURED, repr({"device": "cpu", **{k: str(v) for k, v in options.items()}})]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.rpartition("PEAK ")[2])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_merge_holds_a_shard_not_the_model(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert size > 6 * SHARD
    found = peak(model=adapter, output_dir=tmp_path / "out", max_shard_size="64MB")
    print(f"{size / 1e6:.0f} MB in files, {found / 1e6:.0f} MB at most in memory")
    assert found < 4 * SHARD  # tensors of 34 MB at most, and what malloc keeps


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_gguf_holds_a_tensor_not_the_model(base, tmp_path):
    found = peak(model=base, output_dir=tmp_path / "out", format="gguf")
    print(f"{found / 1e6:.0f} MB at most in memory")
    assert found < 5 * SHARD
