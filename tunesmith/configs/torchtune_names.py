"""torchtune's recipes, models and configs by name: what they stand for, and what its configs set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunesmith.configs import _layers as layers
from tunesmith.configs._layers import Node, Place, Problem

MODELS = {
    "llama2/7B": "meta-llama/Llama-2-7b-hf",
    "llama2/13B": "meta-llama/Llama-2-13b-hf",
    "llama2/70B": "meta-llama/Llama-2-70b-hf",
    "code_llama2/7B": "codellama/CodeLlama-7b-hf",
    "code_llama2/13B": "codellama/CodeLlama-13b-hf",
    "code_llama2/34B": "codellama/CodeLlama-34b-hf",
    "code_llama2/70B": "codellama/CodeLlama-70b-hf",
    "llama3/8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3/70B": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3_1/8B": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "llama3_1/70B": "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "llama3_1/405B": "meta-llama/Meta-Llama-3.1-405B-Instruct",
    "llama3_2/1B": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2/3B": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3_3/70B": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral/7B": "mistralai/Mistral-7B-v0.1",
    "gemma/2B": "google/gemma-2b",
    "gemma/7B": "google/gemma-7b",
    "gemma2/2B": "google/gemma-2-2b",
    "gemma2/9B": "google/gemma-2-9b",
    "gemma2/27B": "google/gemma-2-27b",
    "phi3/mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi4/14B": "microsoft/phi-4",
    "qwen2/0.5B": "Qwen/Qwen2-0.5B-Instruct",
    "qwen2/1.5B": "Qwen/Qwen2-1.5B-Instruct",
    "qwen2/7B": "Qwen/Qwen2-7B-Instruct",
    "qwen2_5/0.5B": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5/1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_5/3B": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2_5/7B": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2_5/14B": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2_5/32B": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2_5/72B": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3/0.6B": "Qwen/Qwen3-0.6B",
    "qwen3/1.7B": "Qwen/Qwen3-1.7B",
    "qwen3/4B": "Qwen/Qwen3-4B",
    "qwen3/8B": "Qwen/Qwen3-8B",
    "qwen3/14B": "Qwen/Qwen3-14B",
    "qwen3/32B": "Qwen/Qwen3-32B",
}
"""{torchtune's model: the Hub repository that its configs fine-tune}."""

MODELS_NOT_THERE = {"llama4": "Llama 4", "llama3_2_vision": "Llama 3.2 Vision", "dev": "the experimental recipes"}

SFT_RECIPES = {
    "full_finetune_single_device": "full",
    "full_finetune_distributed": "full",
    "lora_finetune_single_device": "lora",
    "lora_finetune_distributed": "lora",
    "lora_finetune_distributed_multi_dataset": "lora",
    "qat_single_device": "qat",
    "qat_distributed": "qat",
    "qat_lora_finetune_distributed": "qat lora",
}
"""{recipe: which weights it trains, or the overlays of ours that say so}."""

METHODS_NOT_THERE = {
    "async_grpo": "GRPO",
    "grpo": "GRPO",
    "ppo": "PPO",
    "dpo": "DPO (preference tuning)",
    "knowledge_distillation": "knowledge distillation (KD)",
    "_KD_": "knowledge distillation (KD)",
    "_to_": "knowledge distillation (KD)",
    "early_exit": "early-exit training (LayerSkip)",
    "eval": "evaluation",
    "quantiz": "quantization for inference",
}
"""{part of a recipe's or config's name: the method}."""

GENERATE_RECIPES = ("generate_v2", "generate_v2_distributed")
OTHER_RECIPES = (
    "knowledge_distillation_single_device knowledge_distillation_distributed "
    "lora_dpo_single_device lora_dpo_distributed full_dpo_single_device full_dpo_distributed ppo_full_finetune_single_device "
    "grpo_full_finetune_distributed async_grpo_full_finetune_distributed eleuther_eval early_exit_finetune_distributed"
).split()

_CONFIG = r"(?P<size>[^_].*?)_(?P<update>full_low_memory|full|lora|qlora|dora|qdora|qat_full|qat_lora|qat)(?P<scale>_single_device|_distributed|_multinode)?"


def recipe_names() -> list[str]:
    return [*SFT_RECIPES, *GENERATE_RECIPES, *OTHER_RECIPES]


def config_names() -> list[str]:
    """The names of configs for methods that are there."""
    updates = "full full_single_device lora lora_single_device qlora qlora_single_device qat_full qat_lora".split()
    return [f"{model}_{update}" for model in MODELS for update in updates] + ["generation"]


def is_recipe(name: str) -> bool:
    return bare(name) in recipe_names()


def recipe_for(name: str) -> str | None:
    """Our recipe for a recipe or config of torchtune; None for any other name or a method that is not there."""
    if bare(name) in SFT_RECIPES or (is_config_name(name) and "/" in name and not method_not_there(name)):
        return "sft"
    return "generate" if bare(name) in GENERATE_RECIPES or name == "generation" else None


def is_config_name(name: str) -> bool:
    family, slash, _ = name.partition("/")
    if not slash:
        return name in ("generation", "generation_v2", "quantization", "evaluation", "eleuther_evaluation")
    return family in MODELS_NOT_THERE or any(model.startswith(f"{family}/") for model in MODELS)


def is_size_name(name: str) -> bool:
    """Whether a name such as llama3/8B is a model's alone: no config of torchtune's, which also says how it is trained."""
    family, _, size = name.partition("/")
    return (
        bool(re.fullmatch(r"[\w.]+/[\w.]+", name))
        and not re.fullmatch(_CONFIG, size)
        and not name.endswith((".yaml", ".yml", ".py", ".toml"))
    )


def method_not_there(name: str) -> str | None:
    """The method that a recipe or config stands for, if we have not got it yet."""
    return next((method for part, method in METHODS_NOT_THERE.items() if part in bare(name).rpartition("/")[2]), None)


def bare(name: str) -> str:
    return name.removeprefix("dev/").removesuffix(".py")


# --- what torchtune's configs say ----------------------------------------------------------------


def defaults_of(name: str, place: Place, problems: list[Problem]) -> Node | None:
    """The config of this name, in torchtune's keys."""
    shipped = place._replace(shipped=True)
    if name in ("generation", "generation_v2"):
        model = _builder("llama2/7B", "")
        settings = {
            "prompt": {"system": None, "user": "Tell me a joke."},
            "max_new_tokens": 300,
            "temperature": 0.6,
            "top_k": 300,
        }
        return layers.to_node({"model": {"_component_": model}, "dtype": "bf16", "seed": 1234} | settings, shipped)
    family, _, rest = name.partition("/")
    if family in MODELS_NOT_THERE:
        problems.append(Problem(place, f"`{name}`: {MODELS_NOT_THERE[family]} is not there yet"))
        return None
    parts = re.fullmatch(_CONFIG, rest)
    sizes = {model.partition("/")[2]: model for model in MODELS if model.startswith(f"{family}/")}
    if parts is None or parts["size"] not in sizes:
        from tunesmith.configs._suggest import did_you_mean

        hint = did_you_mean(name, config_names()) or f"; {family} has the sizes {', '.join(sizes)}"
        problems.append(Problem(place, f"no config `{name}`{hint}"))
        return None
    return layers.to_node(_sft_settings(sizes[parts["size"]], parts["update"], parts["scale"] or ""), shipped)


def _sft_settings(model: str, update: str, scale: str) -> dict[str, Any]:
    lora = update.endswith("ora")
    settings: dict[str, Any] = {
        "output_dir": f"/tmp/torchtune/{model.replace('/', '_')}/{update}{scale}",
        "model": {"_component_": _builder(model, "lora_" if lora else "")},
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
        settings["model"] |= {"quantize_base": True} if update in ("qlora", "qdora") else {}
        settings["optimizer"] |= {"lr": 3e-4, "weight_decay": 0.01}
        schedule = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
        settings |= {
            "lr_scheduler": {"_component_": schedule, "num_warmup_steps": 100},
            "gradient_accumulation_steps": 8,
        }
    elif update.startswith("qat"):
        settings["fake_quant_after_n_steps"] = 1000
    elif update == "full_low_memory" or scale == "_single_device":
        settings["optimizer_in_bwd"] = True
    if update.startswith("qat"):
        quantizer = "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"
        settings["quantizer"] = {"_component_": quantizer, "groupsize": 256}
    return settings


def _builder(model: str, prefix: str) -> str:
    family, _, size = model.partition("/")
    return f"torchtune.models.{family}.{prefix}{family}_{size.lower().replace('.', '_')}"


def model_of_builder(dotted: str) -> tuple[str | None, str, str]:
    """(our named size, lora_ or qlora_ or nothing, base or instruct or nothing) of a model builder of torchtune."""
    module, _, name = dotted.removeprefix("torchtune.models.").rpartition(".")
    prefix = next((prefix for prefix in ("qlora_", "lora_") if name.startswith(prefix)), "")
    name = name.removeprefix(prefix)
    kind = next((kind for kind in ("instruct", "base") if name.endswith(f"_{kind}")), "")
    name = name.removesuffix(f"_{kind}") if kind else name
    for model in MODELS:
        family, _, size = model.partition("/")
        if name == f"{family}_{size.lower().replace('.', '_')}" and module.split(".")[0] in (family, ""):
            return model, prefix, kind
    return None, prefix, kind


def repository(model: str, kind: str = "") -> str:
    """The Hub repository of a named size; `kind` base asks for the one that was not tuned to chat."""
    name = MODELS[model]
    if kind == "base":
        return f"{name}-Base" if model.startswith("qwen3/") else name.removesuffix("-Instruct")
    return name


def download_folder(repo: str) -> Path:
    """The folder that torchtune's `tune download` would have made."""
    return Path("/tmp", repo.rpartition("/")[2])


def is_download(folder: Path) -> bool:
    """Whether this is a folder that torchtune's `tune download` makes for one of its models."""
    bare = folder.name.replace("_", ".")
    return str(folder.parent) == "/tmp" and any(
        repo.rpartition("/")[2].replace("_", ".") == bare for repo in MODELS.values()
    )
