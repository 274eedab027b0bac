"""What torchtune's configs set, in its keys: the figures of its recipes, for every model."""

from __future__ import annotations

from typing import Any

from tunesmith.configs import _layers as layers
from tunesmith.configs._layers import Node, Place, Problem
from tunesmith.configs.torchtune_names import (
    EVALUATED,
    MODELS,
    MODELS_NOT_THERE,
    TRAINING_RECIPES,
    bare,
    builder,
    config_names,
    download_folder,
    form_of,
    recipe_for,
    repository,
)

_COSINE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
_UNNAMED = {"distill": "lora", "preference": "lora", "qat": "full"}
"""{kind of config: the weights that it trains where neither its name nor the recipe says it}."""
_TEACHERS = {"llama3_2": "llama3_1"}
"""{family: where the larger models stand that its own are distilled from}."""
_KD_FIGURES: dict[str, dict[str, Any]] = {
    "llama3_2": {"lora_rank": 64, "batch_size": 4},
    "qwen2": {"lora_rank": 32, "batch_size": 8},
    "qwen2_5": {"lora_rank": 64, "batch_size": 2, "enable_activation_checkpointing": True, "epochs": 5},
}
"""{family: what its configs of knowledge distillation set}; other families take those of llama3_2."""


def defaults_of(name: str, recipe: str | None, place: Place, problems: list[Problem]) -> Node | None:
    """The config of this name, in torchtune's keys; `recipe` decides which weights are trained where the name does not say."""
    shipped = place._replace(shipped=True)
    if name in ("generation", "generation_v2"):
        model = builder("llama2/7B", "")
        settings = {
            "prompt": {"system": None, "user": "Tell me a joke."},
            "max_new_tokens": 300,
            "temperature": 0.6,
            "top_k": 300,
        }
        return layers.to_node({"model": {"_component_": model}, "dtype": "bf16", "seed": 1234} | settings, shipped)
    if name == "quantization":
        quantizer = "torchtune.training.quantization.Int8DynActInt4WeightQuantizer"
        settings = {"model": {"_component_": builder("llama2/7B", "")}, "dtype": "bf16", "seed": 1234}
        settings |= {"output_dir": "/tmp/torchtune/llama2_7B/quantized"}
        return layers.to_node(settings | {"quantizer": {"_component_": quantizer, "groupsize": 256}}, shipped)
    if name in EVALUATED:
        settings = {"tasks": ["truthfulqa_mc2"], "batch_size": 8, "dtype": "bf16", "seed": 1234}
        return layers.to_node({"model": {"_component_": builder(EVALUATED[name], "")}} | settings, shipped)
    family, _, rest = name.partition("/")
    if family in MODELS_NOT_THERE:
        problems.append(Problem(place, f"`{name}`: {MODELS_NOT_THERE[family]} is not there yet"))
        return None
    kind, parts = form_of(rest)
    sizes = {model.partition("/")[2]: model for model in MODELS if model.startswith(f"{family}/")}
    teacher = _teacher(family, parts["teacher"]) if kind == "distill" else None
    if kind is None or parts["size"] not in sizes or kind == "distill" and teacher is None:
        from tunesmith.configs._suggest import did_you_mean

        hint = did_you_mean(name, config_names()) or f"; {family} has the sizes {', '.join(sizes)}"
        problems.append(Problem(place, f"no config `{name}`{hint}"))
        return None
    training = TRAINING_RECIPES.get(bare(recipe or ""))
    unnamed = training.update if training and training.recipe == recipe_for(name) else _UNNAMED.get(kind, "")
    update, scale = parts.get("update", unnamed), parts.get("scale", "")
    settings = _sft_settings(sizes[parts["size"]], update, scale)
    size = f"{parts['teacher']}_to_{parts['size']}" if teacher else parts["size"]
    settings["output_dir"] = f"/tmp/torchtune/{family}_{size}/{rest.removeprefix(f'{size}_')}"
    if kind == "preference":
        settings |= _dpo_settings(settings, sizes[parts["size"]], update)
    elif kind == "qat":
        settings |= _qat_settings(update)
    elif teacher:
        settings |= _kd_settings(settings, family, teacher)
    return layers.to_node(settings, shipped)


def _teacher(family: str, size: str) -> str | None:
    """The model of a teacher's size, which torchtune also writes without its B."""
    places = [family, *([_TEACHERS[family]] if family in _TEACHERS else [])]
    named = [f"{place}/{written}" for place in places for written in (size, f"{size}B")]
    return next((model for model in named if model in MODELS), None)


def _sft_settings(model: str, update: str, scale: str) -> dict[str, Any]:
    lora = update.endswith("ora")
    settings: dict[str, Any] = {
        "model": {"_component_": builder(model, "lora_" if lora else "")},
        "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False},
        "seed": None,
        "shuffle": True,
        "batch_size": 2,
        "epochs": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
        "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": None,
        "enable_activation_checkpointing": True,
        "dtype": "bf16",
    }
    if lora:
        adapters = {
            "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
        }
        settings["model"] |= adapters | {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0}
        settings["model"] |= {"use_dora": True} if "dora" in update else {}
        settings["model"] |= {"quantize_base": True} if update.startswith("q") else {}
        settings["optimizer"] |= {"lr": 3e-4, "weight_decay": 0.01}
        settings |= {
            "lr_scheduler": {"_component_": _COSINE, "num_warmup_steps": 100},
            "gradient_accumulation_steps": 8,
        }
    elif update == "full_low_memory" or scale == "_single_device":
        settings["optimizer_in_bwd"] = True
    return settings


def _dpo_settings(sft: dict[str, Any], model: str, update: str) -> dict[str, Any]:
    """What the configs of DPO have otherwise; with full weights the reference is named, the model as it was downloaded."""
    lora = update.endswith("ora")
    settings: dict[str, Any] = {
        "dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"},
        "batch_size": 4,
        "optimizer": sft["optimizer"] | {"lr": 5e-4 if lora else 2e-5, "weight_decay": 0.05},
        "lr_scheduler": {"_component_": _COSINE, "num_warmup_steps": 100 if lora else 20},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1 if lora else 0.05, "label_smoothing": 0.0},
        "max_steps_per_epoch": 1000,
        "gradient_accumulation_steps": 8,
        "optimizer_in_bwd": False,
    }
    if not lora:
        settings["tokenizer"] = {"max_seq_len": 1024}
        settings["ref_checkpointer"] = {"checkpoint_dir": str(download_folder(repository(model)))}
    return settings


def _kd_settings(sft: dict[str, Any], family: str, teacher: str) -> dict[str, Any]:
    """What the configs of knowledge distillation have otherwise."""
    figures = dict(_KD_FIGURES.get(family, _KD_FIGURES["llama3_2"]))
    rank = figures.pop("lora_rank")
    adapters = {"lora_rank": rank, "lora_alpha": 2 * rank} if "lora_rank" in sft["model"] else {}
    return {
        "model": sft["model"] | adapters,
        "teacher_model": {"_component_": builder(teacher, "")},
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
        "kd_ratio": 0.5,
        "gradient_accumulation_steps": 8,
        "enable_activation_checkpointing": False,
        "optimizer_in_bwd": False,
    } | figures


def _qat_settings(update: str) -> dict[str, Any]:
    """What the configs of quantization-aware training have otherwise."""
    quantizer = "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"
    settings: dict[str, Any] = {"quantizer": {"_component_": quantizer, "groupsize": 256}}
    return settings | ({"enable_activation_checkpointing": False} if update == "lora" else {})
