"""PEFT adapters written for other programs: peft computes with them what we do."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export.conftest import repository, run
from tests.recipes.test_export import make_adapter
from tunesmith.errors import UserError
from tunesmith.export import adapter
from tunesmith.training.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 70, 33, 80, 5, 9, 200]])


@pytest.fixture
def quick(monkeypatch):
    """Without the process in which peft reads the tensors: to import it takes seconds, and here it computes with them anyway."""
    monkeypatch.setattr(adapter, "_read_by_peft", lambda *_: 0.0)


def difference(folder, base) -> float:
    """Of peft's logits and ours, relative to the largest."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ours = load_model(folder, base=base).logits(IDS)
    with torch.no_grad():
        return ((ours - theirs(IDS).logits).abs().max() / ours.abs().max()).item()


@pytest.mark.parametrize(
    "kind", [dict(), dict(use_dora=True), dict(use_rslora=True, rank=4), dict(target_modules=["q_proj", "lm_head"])]
)
def test_our_adapters(tmp_path, capsys, request, kind):
    if kind:
        request.getfixturevalue("quick")
    base = repository(tmp_path / "base", "llama")
    run(make_adapter(base, tmp_path / "adapter", **kind), tmp_path / "out", format="adapter")
    assert difference(tmp_path / "out", base) < 1e-5
    printed = capsys.readouterr().out
    assert "read back by tunesmith: largest difference of the logits" in printed
    assert "read back by peft: largest difference of the adapter's tensors 0.0e+00" in printed
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    leaf = r"(lora_[AB]\.weight|lora_magnitude_vector)"
    assert all(
        re.fullmatch(rf"base_model\.model\.(model\.layers\.\d+\.\w+\.\w+|lm_head)\.{leaf}", name) for name in names
    )


def test_an_adapter_of_peft(tmp_path, quick):
    """Ranks and alphas of single layers stay, and so does the tokenizer that lies beside it."""
    base = repository(tmp_path / "base", "llama")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=9, target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"0.mlp.up_proj": 3},
                   init_lora_weights=False, task_type="CAUSAL_LM"),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    run(tmp_path / "adapter", tmp_path / "out", format="adapter", base=str(base))
    assert difference(tmp_path / "out", base) < 1e-5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_number_type(tmp_path, quick):
    base = repository(tmp_path / "base", "llama")
    run(make_adapter(base, tmp_path / "adapter"), tmp_path / "out", format="adapter", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_mistakes(tmp_path):
    base = repository(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="`format: adapter` writes an adapter, and .* is none"):
        run(base, tmp_path / "out", format="adapter")
    with pytest.raises(UserError, match="the adapter changes nothing"):
        run(make_adapter(base, tmp_path / "nothing", size=0), tmp_path / "out", format="adapter")
    with pytest.raises(UserError, match="more than 1e-07"):
        run(make_adapter(base, tmp_path / "adapter"), tmp_path / "out", format="adapter", dtype="bf16", tolerance=1e-7)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))
