"""PEFT adapters: put on a model, read, written, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.adapter_config import CLASSIFIERS, CONFIG, adapter_config, lora_options, read_adapter_config
from tunesmith.checkpoint.check import TOLERANCES, check_logits, probe_logits
from tunesmith.checkpoint.hf import SavesFiles, explain_full_disk, outgoing, save_tokenizer, staged
from tunesmith.checkpoint.tensor_files import StoredTensor, read_tensor_file
from tunesmith.checkpoint.write import write_tensors, write_text
from tunesmith.errors import UserError
from tunesmith.hub import read_json
from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import Family
from tunesmith.models.score import ScoreModel
from tunesmith.nn.lora import adaptable_layers, adapter_state, adapters_off, apply_lora, is_adapters
from tunesmith.nn.part import Part, local_tensor, parameter_parts, speaks_for
from tunesmith.parallel.mesh import Ranks

SCORES = "score_config.json"
"""What a reward model's config.json says about its scores, which PEFT has no place for; not needed to load the adapter."""
_SCORE_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id", "classifier_dropout")
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "lm_head.base_layer.weight", "embed_tokens.base_layer.weight")


# --- reading -----------------------------------------------------------------------------------------


def adapted_config(folder: str | Path, family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """config.json's content of the model that base and adapter make: where the adapter is a classifier's, that of one."""
    per_token = CLASSIFIERS.get(read_adapter_config(folder).get("task_type", ""))
    if per_token is None:
        return hf
    head = _read_tensors(Path(folder)).get(f"{_PREFIX}score.weight")
    if head is None:
        raise UserError(
            f"the adapter in {folder} is a classifier's and holds no score.weight: save or download it again"
        )
    own = read_json(Path(folder) / SCORES) if (Path(folder) / SCORES).is_file() else {}
    labels = family.label_names(hf)
    if len(labels) != head.shape[0]:
        labels = [f"LABEL_{number}" for number in range(head.shape[0])]
    return family.classifier_config(hf, labels, per_token) | {key: own[key] for key in _SCORE_KEYS if key in own}


def apply_adapter(
    model: CausalLM,
    folder: str | Path,
    dropout: float = 0.0,
    quantize_base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put the layers of the adapter in `folder` on `model`, without values: those are read by `load_adapter`.

    Which layers they are is taken from the file of tensors, so that every way to choose them in PEFT is honoured. Raises UserError,
    naming the first that doesn't fit, for an adapter that was made for another model.
    """
    config = read_adapter_config(folder)
    stored = _read_tensors(Path(folder))
    names = list(dict.fromkeys(_module_of(name) for name in stored if _leaf_of(name)))
    if not names:
        raise UserError(f"{folder} holds no LoRA weights: save or download the adapter again")
    layers = adaptable_layers(model)
    for name in names:
        if name not in layers:
            raise UserError(
                _another_base(folder, config, f"it has weights for {name}, and the model no such linear layer")
            )
    options: dict[str, Any] = lora_options(config)
    options["target_modules"] = names
    apply_lora(model, dropout=dropout, quantize_base=quantize_base, dtype=dtype, **options)
    _check_names_and_shapes(model, folder, config, stored)


@torch.no_grad()
def load_adapter(model: CausalLM, folder: str | Path) -> None:
    """Read the adapter in `folder` into the adapter layers of `model`, which must be the ones it has.

    Raises UserError for a file that is missing or broken, and, naming the first that doesn't fit, for tensors that lack, are left over or have
    another shape: the adapter of another model, or of another shape than the layers on this one.
    """
    config, stored = read_adapter_config(folder), _read_tensors(Path(folder))
    parts = _check_names_and_shapes(model, folder, config, stored)
    for name in stored.keys() - parts.keys():
        if not name.removeprefix(_PREFIX).startswith(model.elsewhere):
            _check_embedding(model, name, stored[name])
    for name, parameter in adapter_state(model).items():
        if (own := stored.get(peft_name(name))) is not None:
            own.read_into(parameter, parts[peft_name(name)])


def _check_names_and_shapes(
    model: CausalLM, folder: str | Path, config: dict[str, Any], stored: dict[str, StoredTensor]
) -> dict[str, Part]:
    """{name in the file: part that is here} of all adapters. Raises UserError where `stored` are not theirs; needs no values."""
    parts = {peft_name(name): part for name, part in parameter_parts(model).items() if is_adapters(model, name)}
    for name, tensor in stored.items():
        if name in parts:
            if tensor.shape != parts[name].shape:
                shapes = f"its {name} has the shape {tuple(tensor.shape)}, the model needs {tuple(parts[name].shape)}"
                raise UserError(_another_base(folder, config, shapes))
        elif name.removeprefix(_PREFIX).startswith(model.elsewhere):
            continue
        elif not name.endswith(_EMBEDDINGS):
            raise UserError(_another_base(folder, config, f"it has {name}, and the model no adapter there"))
    lacking = [name for name in parts if name not in stored and not _may_lack(config, name)]
    if lacking:
        raise UserError(_another_base(folder, config, f"the model has an adapter at {lacking[0]}, and it none"))
    return parts


def _may_lack(config: dict[str, Any], name: str) -> bool:
    """A reward model may go on from a language model's adapter, which has no scoring head."""
    return _leaf_of(name) is None and config.get("task_type") not in CLASSIFIERS


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / file).is_file():
            return {_plain_name(name): tensor for name, tensor in read_tensor_file(folder / file).items()}
    raise UserError(
        f"{folder} holds no adapter_model.safetensors: the adapter is not complete; save or download it again"
    )


def _plain_name(name: str) -> str:
    """Older versions of PEFT ended the name of a magnitude otherwise."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _leaf_of(name: str) -> str | None:
    """Which of our parameters a name in an adapter file stands for; None for an embedding."""
    return next((leaf for leaf, suffix in _SUFFIXES.items() if name.endswith("." + suffix)), None)


def _module_of(name: str) -> str:
    leaf = _leaf_of(name)
    assert leaf is not None
    return name.removeprefix(_PREFIX).removesuffix("." + _SUFFIXES[leaf])


def peft_name(name: str) -> str:
    """model.layers.0.….q_proj.lora_A -> base_model.model.model.layers.0.….q_proj.lora_A.weight"""
    module, _, leaf = name.rpartition(".")
    return f"{_PREFIX}{module}.{_SUFFIXES.get(leaf, leaf)}"


def _another_base(folder: str | Path, config: dict[str, Any], what: str) -> str:
    base = config.get("base_model_name_or_path")
    return f"the adapter in {folder} doesn't fit this model: {what}" + (
        f"; it was made for {base}" if base else "; give the base it was made for"
    )


def _check_embedding(model: CausalLM, name: str, tensor: StoredTensor) -> None:
    """PEFT puts the embedding beside adapters on the output layer: harmless where it is the model's own, or what of it is here."""
    is_head = "embed_tokens" not in name and model.head.tied_to is None
    ours = "lm_head.weight" if is_head else "model.embed_tokens.weight"
    own, part = local_tensor(model.get_parameter(ours).detach()), parameter_parts(model)[ours]
    is_same = tuple(tensor.shape) == part.shape
    if is_same:
        theirs = torch.empty(own.shape, dtype=tensor.dtype)
        tensor.read_into(theirs, part)
        is_same = torch.equal(theirs.to(own), own)
    if not is_same:
        raise UserError(
            f"{tensor.path} brings {name}, an embedding other than the model's: adapters with trained or resized embeddings are not supported; merge it into its base in PEFT and use the result as a model"
        )


# --- writing -----------------------------------------------------------------------------------------


def stage_adapter(
    model: CausalLM,
    base_name: str | None,
    tokenizer: SavesFiles | None = None,
    copy: bool = False,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Callable[[Path], dict[str, str]]:
    """Take the adapter as it is now; return the function that writes it into a folder for PEFT and returns {file: sha256}.

    copy: keep copies, so that training may go on while they are written. dtype: of the files; default: the adapter's.
    ranks: those that hold the model together, all of which call the writer. The writer lets OSError pass.
    """
    ranks = ranks or Ranks()
    parts, speaks = parameter_parts(model), speaks_for(model)
    tensors = {
        peft_name(name): outgoing(parameter, parts[name], speaks(name), dtype)
        for name, parameter in model.named_parameters()
        if is_adapters(model, name)
    }
    if copy:
        tensors = staged(tensors)
    config = adapter_config(model, base_name, ranks)

    def write(folder: Path) -> dict[str, str]:
        digests = write_tensors(tensors, folder, "adapter_model", math.inf, ranks)
        return digests | ranks.from_main(lambda: write_rest(folder))

    def write_rest(folder: Path) -> dict[str, str]:
        digest = write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return {CONFIG: digest} | write_scores(folder) | save_tokenizer(tokenizer, folder)

    def write_scores(folder: Path) -> dict[str, str]:
        if not isinstance(model, ScoreModel):
            return {}
        own = {key: model.hf_config[key] for key in _SCORE_KEYS if key in model.hf_config}
        return {SCORES: write_text(folder / SCORES, json.dumps(own, indent=2, sort_keys=True) + "\n")}

    return write


def save_adapter(
    model: CausalLM, folder: str | Path, base_name: str | None, tokenizer: SavesFiles | None = None
) -> dict[str, str]:
    """Write the adapter of `model` into `folder` for PEFT; return {file: sha256}. Raises UserError for a full disk.

    base_name: folder or Hub id of the base model, for those who load the adapter.
    """
    with explain_full_disk(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        return stage_adapter(model, base_name, tokenizer)(Path(folder))


# --- checking ----------------------------------------------------------------------------------------


def check_changes_something(model: CausalLM, logits: Tensor | None = None) -> None:
    """Raise UserError where the adapter of `model` doesn't change its logits at all."""
    # By their logits, not their weights: a rank may hold but a few of the adapters.
    logits = probe_logits(model) if logits is None else logits
    with adapters_off(model):
        unchanged = torch.equal(logits, probe_logits(model))
    if unchanged:
        raise UserError(
            "the adapter changes nothing, the logits are those of its base: it was not trained, or with a learning rate too small for its number type"
        )


@torch.no_grad()
def check_saved_adapter(model: CausalLM, folder: str | Path, tolerance: float | None = None) -> float:
    """Read the adapter in `folder` back, put it in place of the one in memory for a moment, and compare the logits.

    Returns the largest difference relative to the largest logit. Raises UserError where it is above `tolerance` (default by number type),
    and for an adapter that changes nothing.
    """
    ours = probe_logits(model)
    check_changes_something(model, ours)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    try:
        load_adapter(model, folder)
        theirs = probe_logits(model)
    finally:
        for name, tensor in adapter_state(model).items():
            tensor.copy_(before[name])
    if tolerance is None:
        tolerance = TOLERANCES[model.model.compute_dtype]
    return check_logits(ours, theirs, tolerance, str(folder))
