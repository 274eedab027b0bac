"""adapter_config.json, PEFT's description of an adapter: read, checked, written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.models.config_json import check_known
from tunesmith.models.decoder import CausalLM
from tunesmith.models.score import ScoreModel
from tunesmith.nn.lora import adaptable_layers, adapter_layers
from tunesmith.parallel.mesh import Ranks

CONFIG = "adapter_config.json"
CLASSIFIERS = {"SEQ_CLS": False, "TOKEN_CLS": True}
"""{PEFT's task_type: whether it scores tokens}."""
_HEAD = ("score", "classifier")
"""What PEFT calls the head of a classifier, trained whole beside adapters; it writes both names."""

# Keys of adapter_config.json that change what an adapter computes, and that we don't: {key: the values that mean "not used"}.
_NOT_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "kasa_config": (None, {}),
    "megatron_config": (None, {}),
}
# Ways to initialise that also change the base's weights, and are not undone when such an adapter is saved as it is.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The content of adapter_config.json in `folder`. Raises UserError where it is missing, broken, or asks for what we don't compute."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no adapter: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: save or download the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path} describes an adapter of type {kind}; only LORA (with DoRA and rsLoRA) is understood")
    check_known(config, str(path))
    for key, unused in _NOT_UNDERSTOOD.items():
        is_head = (
            key == "modules_to_save" and config.get("task_type") in CLASSIFIERS and set(config[key] or ()) <= {*_HEAD}
        )
        if config.get(key) not in unused and not is_head:
            raise UserError(
                f"{path} sets {key} to {config[key]!r}, which is not supported: train or export the adapter without it"
            )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise UserError(
            f"{path} sets init_lora_weights to {initial!r}, which changes the base's weights too: convert the adapter to plain LoRA when saving it in PEFT"
        )
    return config


def brings_head(folder: str | Path) -> bool:
    """Whether the adapter in `folder` is a classifier's, and holds its whole head."""
    return read_adapter_config(folder).get("task_type") in CLASSIFIERS


def lora_options(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `apply_lora` (but dropout and quantize_base) that an adapter_config.json stands for."""
    return {
        "rank": config.get("r", 8),
        "alpha": float(config.get("lora_alpha", 8)),
        "target_modules": config.get("target_modules") or [],
        "use_dora": bool(config.get("use_dora")),
        "use_rslora": bool(config.get("use_rslora")),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }


def adapter_config(model: CausalLM, base_name: str | None, ranks: Ranks | None = None) -> dict[str, Any]:
    """The adapter_config.json from which PEFT makes the adapter of `model`, whose layers `ranks` may hold together."""
    ranks = ranks or Ranks()
    own = {name: layer.lora for name, layer in adapter_layers(model).items()}
    settings = {name: lora for held in ranks.gather(own) for name, lora in held.items()}
    adaptable = [name for held in ranks.gather(list(adaptable_layers(model))) for name in held]
    if not settings:
        raise ValueError("the model has no adapter")
    rank, alpha = (
        Counter(getattr(lora, key) for lora in settings.values()).most_common(1)[0][0] for key in ("rank", "alpha")
    )
    first = next(iter(settings.values()))
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": first.dropout,
        "target_modules": _shortest_targets(adaptable, list(settings)),
        "rank_pattern": {_exactly(name): lora.rank for name, lora in settings.items() if lora.rank != rank},
        "alpha_pattern": {_exactly(name): _whole(lora.alpha) for name, lora in settings.items() if lora.alpha != alpha},
        "use_dora": first.use_dora,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": [model.head_name] if isinstance(model, ScoreModel) else None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _task_type(model: CausalLM) -> str:
    if not isinstance(model, ScoreModel):
        return "CAUSAL_LM"
    return next(task for task, per_token in CLASSIFIERS.items() if per_token == model.scored.per_token)


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _exactly(name: str) -> str:
    """A pattern for one layer: PEFT takes keys as regular expressions that may match from any dot on."""
    return "^" + name.replace(".", r"\.")


def _shortest_targets(adaptable: list[str], names: list[str]) -> list[str]:
    """Last names where they mean exactly these layers (what other programs expect), else full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in adaptable if name.rpartition(".")[2] in leaves}
    return leaves if meant == set(names) else names
