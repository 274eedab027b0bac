"""A PEFT adapter, under the names that peft, vLLM and llama.cpp's converter expect, whatever program wrote the one it is made from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tunesmith import hub
from tunesmith.checkpoint.adapter import check_saved_adapter, peft_name, stage_adapter
from tunesmith.checkpoint.adapter_config import CONFIG, read_adapter_config
from tunesmith.checkpoint.check import TOLERANCES, verify
from tunesmith.checkpoint.hf import copy_files, explain_full_disk
from tunesmith.checkpoint.tensor_files import read_tensor_file
from tunesmith.configs.export import Export
from tunesmith.errors import UserError
from tunesmith.export.result import Check, Exported
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.lora import adapter_state
from tunesmith.training.dtypes import DTYPES

_PEFT = """
import sys
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors.torch import save_file
PeftConfig.from_pretrained(sys.argv[1])
save_file({name: tensor.contiguous() for name, tensor in load_peft_weights(sys.argv[1], device="cpu").items()}, sys.argv[2])
"""
"""Run in a process of its own: peft and what it imports have much to say."""
_ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest difference of a tensor read back, relative to the largest of its numbers."""


def export_adapter(source: Source, folder: Path, config: Export) -> Exported:
    """Write the adapter of `source` into `folder`; read it back and compare the logits, and its tensors as peft reads them where it is installed."""
    model = source.stream(config.device)
    dtype = DTYPES[config.dtype] if config.dtype else None
    before = read_adapter_config(source.folder)
    write = stage_adapter(model, config.base or before.get("base_model_name_or_path"), dtype=dtype)
    with explain_full_disk(folder):
        digests = write(folder)
        if source.tokenizer == source.folder:
            digests |= copy_files(source.folder, folder, hub.TOKENIZER_FILES)
    verify(folder, digests)
    types = (dtype or torch.float32, model.model.compute_dtype)
    tolerance = config.tolerance or max(TOLERANCES[one] for one in types)
    checks = [Check("tunesmith", "logits", check_saved_adapter(model, folder, tolerance), tolerance)]
    notes = [f"its base is {json.loads((folder / CONFIG).read_text())['base_model_name_or_path']}"]
    if importlib.util.find_spec("peft") is None:
        return Exported(checks, [*notes, "peft is not installed, so it did not read the adapter"])
    difference = _read_by_peft(model, folder)
    return Exported([*checks, Check("peft", "adapter's tensors", difference, _ROUNDING[dtype or torch.float32])], notes)


def _read_by_peft(model: CausalLM, folder: Path) -> float:
    """Largest difference of a tensor that peft reads from that of `model`, relative to the largest of its numbers; infinite where names differ."""
    with tempfile.TemporaryDirectory() as place:
        read = Path(place) / "read.safetensors"
        ran = subprocess.run([sys.executable, "-c", _PEFT, str(folder), str(read)], capture_output=True, check=False)
        if ran.returncode != 0:
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            raise UserError(
                f"peft does not read the adapter: {said[-1] if said else ran.returncode}; nothing was written; report it"
            )
        theirs = {name: tensor.tensor().float() for name, tensor in read_tensor_file(read).items()}
    ours: dict[str, Tensor] = {peft_name(name): tensor.cpu().float() for name, tensor in adapter_state(model).items()}
    if ours.keys() != theirs.keys():
        return float("inf")
    found = [(theirs[name] - own).abs().max() / own.abs().max().clamp_min(1e-30) for name, own in ours.items()]
    return max(one.item() for one in found)
