"""The recipes and overlays that ship: their names, one sentence each, and where their parts are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

from tunesmith.errors import UserError

FOLDER = Path(__file__).parent


class Recipe(NamedTuple):
    """A method: its name, its options' class, the module with its main(config), and one sentence."""

    name: str
    schema: str
    module: str
    summary: str

    @property
    def config_class(self) -> type:
        module, _, name = self.schema.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def defaults(self) -> Path:
        """The YAML file with the recipe's own defaults."""
        return FOLDER / f"{self.name}.yaml"


def _recipe(name: str, class_name: str, summary: str) -> Recipe:
    return Recipe(name, f"tunesmith.configs.{name}:{class_name}", f"tunesmith.recipes.{name}", summary)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("sft", "SFT", "Supervised fine-tuning: raise the likelihood of the answers."),
        _recipe(
            "pretrain", "Pretrain", "Pre-training: next-token loss on plain text, from scratch or from a checkpoint."
        ),
        _recipe(
            "preference",
            "Preference",
            "Preference tuning: raise preferred answers over rejected ones (DPO and its kin).",
        ),
        _recipe("distill", "Distill", "Distillation: learn from a larger model's distribution over every next token."),
        _recipe(
            "reward",
            "Reward",
            "Models that score: rewards from preferred answers, classes of texts, steps of an answer.",
        ),
        _recipe("generate", "Generate", "Generation: continue prompts or answer them."),
        _recipe(
            "evaluate",
            "Evaluate",
            "Evaluation: scores on tasks of lm-evaluation-harness, perplexity of texts, models side by side.",
        ),
        _recipe(
            "quantize",
            "Quantize",
            "Quantization: round a trained model to 8 or 4 bits, for transformers and tunesmith.",
        ),
        _recipe(
            "export",
            "Export",
            "Export: a model for other programs: merged, in another number type, as an adapter, as GGUF, as a program.",
        ),
    )
}

LATER_RECIPES = {
    "ppo": "PPO",
    "grpo": "GRPO",
}

LATER_OVERLAYS = {
    "fp8": "fp8 training",
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; UserError with the nearest name where there is none."""
    if name in RECIPES:
        return RECIPES[name]
    if name in LATER_RECIPES:
        raise UserError(f"the recipe `{name}`, {LATER_RECIPES[name]}, is not there yet")
    from tunesmith.configs._suggest import did_you_mean

    raise UserError(
        f"no recipe `{name}`{did_you_mean(name, [*RECIPES, *LATER_RECIPES])}; there are {', '.join(RECIPES)}, or a file (.yaml, .py)"
    )


def overlays() -> dict[str, str]:
    """{name: its first comment line} of the overlays that ship."""
    return {path.stem: first_comment(path) for path in sorted((FOLDER / "overlays").glob("*.yaml"))}


def overlay_path(name: str) -> Path:
    return FOLDER / "overlays" / f"{name}.yaml"


def first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()
