"""torchtune's recipes, models and configs by name: what they stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

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


class Training(NamedTuple):
    """What a recipe or a config of torchtune trains."""

    recipe: str
    """Our recipe."""
    update: str
    """Which weights: full, or lora and its kin."""
    qat: bool = False


TRAINING_RECIPES = {
    "full_finetune_single_device": Training("sft", "full"),
    "full_finetune_distributed": Training("sft", "full"),
    "lora_finetune_single_device": Training("sft", "lora"),
    "lora_finetune_distributed": Training("sft", "lora"),
    "lora_finetune_distributed_multi_dataset": Training("sft", "lora"),
    "full_dpo_single_device": Training("preference", "full"),
    "full_dpo_distributed": Training("preference", "full"),
    "lora_dpo_single_device": Training("preference", "lora"),
    "lora_dpo_distributed": Training("preference", "lora"),
    "knowledge_distillation_single_device": Training("distill", "lora"),
    "knowledge_distillation_distributed": Training("distill", "lora"),
    "qat_single_device": Training("sft", "full", qat=True),
    "qat_distributed": Training("sft", "full", qat=True),
    "qat_lora_finetune_distributed": Training("sft", "lora", qat=True),
}

METHODS_NOT_THERE = {
    "async_grpo": "GRPO",
    "grpo": "GRPO",
    "ppo": "PPO",
    "early_exit": "early-exit training (LayerSkip)",
}
"""{part of a recipe's or config's name: the method}."""

GENERATE_RECIPES = ("generate_v2", "generate_v2_distributed")
EVALUATE_RECIPES = ("eleuther_eval",)
EVALUATED = {
    "eleuther_evaluation": "llama2/7B",
    "evaluation": "llama2/7B",
    "gemma/evaluation": "gemma/2B",
    "llama3_2/evaluation": "llama3_2/3B",
    "mistral/evaluation": "mistral/7B",
    "phi3/evaluation": "phi3/mini",
    "phi4/evaluation": "phi4/14B",
    "qwen2/evaluation": "qwen2/7B",
    "qwen2_5/evaluation": "qwen2_5/3B",
}
"""{config of evaluation: its model}."""
OTHER_RECIPES = (
    "ppo_full_finetune_single_device",
    "grpo_full_finetune_distributed",
    "async_grpo_full_finetune_distributed",
    "early_exit_finetune_distributed",
)

_UPDATE = r"(?P<update>full|q?lora|q?dora)"
_SCALE = r"(?P<scale>_single_device|_distributed|_multinode)?"
_FORMS = {
    "distill": rf"(?P<teacher>[^_]+)_to_(?P<size>[^_]+)_KD(?:_{_UPDATE})?{_SCALE}",
    "preference": rf"(?P<size>[^_]+)(?:_{_UPDATE})?_dpo{_SCALE}",
    "qat": rf"(?P<size>[^_]+)_qat(?:_(?P<update>full|lora))?{_SCALE}",
    "sft": rf"(?P<size>[^_].*?)_(?P<update>full_low_memory|full|q?lora|q?dora){_SCALE}",
}
"""{kind: how the part of a config's name behind the slash reads}."""


def recipe_names() -> list[str]:
    return [*TRAINING_RECIPES, *GENERATE_RECIPES, *EVALUATE_RECIPES, *OTHER_RECIPES]


def config_names() -> list[str]:
    """The names of configs for methods that are there."""
    updates = ("full", "full_single_device", "lora", "lora_single_device", "qlora", "qlora_single_device")
    updates += ("full_dpo", "lora_dpo", "lora_dpo_single_device", "qat_full", "qat_lora", "qat_single_device")
    pairs = ("llama3_2/8B_to_1B", "qwen2/1.5B_to_0.5B", "qwen2_5/14B_to_7B")
    scales = ("single_device", "distributed")
    distilled = [f"{pair}_KD_lora_{scale}" for pair in pairs for scale in scales]
    return [
        *(f"{model}_{update}" for model in MODELS for update in updates),
        *distilled,
        "generation",
        "quantization",
        *EVALUATED,
    ]


def is_recipe(name: str) -> bool:
    return bare(name) in recipe_names()


def recipe_for(name: str) -> str | None:
    """Our recipe for a recipe or config of torchtune; None for any other name or a method that is not there."""
    if training := TRAINING_RECIPES.get(bare(name)):
        return training.recipe
    if bare(name) in EVALUATE_RECIPES or name in EVALUATED:
        return "evaluate"
    if name == "quantization":
        return "quantize"
    if is_config_name(name) and "/" in name and not method_not_there(name):
        kind, _ = form_of(name.partition("/")[2])
        return "sft" if kind in (None, "qat") else kind
    return "generate" if bare(name) in GENERATE_RECIPES or name == "generation" else None


def form_of(rest: str) -> tuple[str | None, dict[str, str]]:
    """(the kind of _FORMS that the part of a config's name behind the slash has, its parts that are named)."""
    for kind, form in _FORMS.items():
        if found := re.fullmatch(form, rest):
            return kind, {part: text for part, text in found.groupdict().items() if text}
    return None, {}


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
        and form_of(size)[0] is None
        and name not in EVALUATED
        and not name.endswith((".yaml", ".yml", ".py", ".toml"))
    )


def method_not_there(name: str) -> str | None:
    """The method that a recipe or config stands for, if we have not got it yet."""
    return next((method for part, method in METHODS_NOT_THERE.items() if part in bare(name).rpartition("/")[2]), None)


def bare(name: str) -> str:
    return name.removeprefix("dev/").removesuffix(".py")


def builder(model: str, prefix: str) -> str:
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
    return downloaded(folder) is not None


def downloaded(folder: Path) -> str | None:
    """The Hub repository of one of torchtune's models that its `tune download` puts into this folder."""
    bare = folder.name.replace("_", ".")
    repos = MODELS.values() if str(folder.parent) == "/tmp" else ()
    return next((repo for repo in repos if repo.rpartition("/")[2].replace("_", ".") == bare), None)
