"""torchtune's recipes, configs and settings as layers of ours. This file and its neighbours torchtune_*.py alone know that torchtune existed."""

from __future__ import annotations

from typing import Any, NamedTuple

from tunesmith.configs import _layers as layers
from tunesmith.configs._interpolate import Interpolation
from tunesmith.configs._layers import Node, Place, Problem
from tunesmith.configs.recipes import RECIPES, overlay_path
from tunesmith.configs.torchtune_methods import method_of_file
from tunesmith.configs.torchtune_names import TRAINING_RECIPES, bare, is_recipe, method_not_there, recipe_for
from tunesmith.configs.torchtune_sections import Translation
from tunesmith.configs.torchtune_shipped import defaults_of


class Translated(NamedTuple):
    """What torchtune's words say in ours: what its configs set, and what the user wrote."""

    recipe: str | None
    shipped: Node
    written: Node


Change = tuple[list[str], Node | None, Place]


def translate(
    recipe: str | None,
    configs: list[tuple[Place, str]],
    files: list[Node],
    changes: list[Change],
    problems: list[Problem],
) -> Translated:
    """torchtune's recipe, config names, files and settings as layers of ours; what has no counterpart is a problem."""
    nothing = Translated(None, Node({}, Place(0, "")), Node({}, Place(0, "")))
    for place, name in [(Place(0, "command line"), recipe or ""), *configs]:
        if method := method_not_there(name):
            problems.append(Problem(place, f"`{name}` is {method}, a method that is not there yet"))
            return nothing
    tree, own_model = _tree(recipe, configs, files, changes, problems)
    if tree is None:
        return nothing
    ours = _our_recipe(recipe, configs, tree, problems)
    if ours is None:
        return nothing
    tree = Interpolation(tree, _no_default, problems, strict=False).run()
    from_config = bool(configs) or bool(tree.value.get("checkpointer"))
    out = Translation(tree, problems, from_config, ours, own_model).run()
    for name in reversed(_overlays_of(recipe, tree, is_alone=not configs and not files)):
        overlay = layers.read_file(overlay_path(name), 0, problems, shipped=True)
        out = layers.merge(overlay, out, problems) if overlay else out
    return Translated(ours, _part(out, shipped=True), _part(out, shipped=False))


def _tree(
    recipe: str | None,
    configs: list[tuple[Place, str]],
    files: list[Node],
    changes: list[Change],
    problems: list[Problem],
) -> tuple[Node | None, Node | None]:
    """(all layers as one tree in torchtune's keys, None where a config is missing; a model named by folder or Hub id in place of a builder)."""
    tree, own_model = Node({}, Place(0, "", 0, True)), None
    for place, name in configs:
        defaults = defaults_of(name, recipe, place, problems)
        if defaults is None:
            return None, None
        tree = layers.merge(tree, defaults, problems)
    for file in files:
        tree = layers.merge(tree, file, problems)
    for keys, node, _ in changes:
        component = node and _component(keys, node)
        if component is None:
            tree = layers.delete(tree, keys)
        elif keys == ["model"] and isinstance(component.value, str) and isinstance(_value(tree, "model"), dict):
            own_model = component  # what the builder says of adapters stays
        else:
            tree = layers.merge(tree, layers.nest(keys, component), problems)
    return tree, own_model


def _value(tree: Node, key: str) -> Any:
    return tree.value[key].value if key in tree.value else None


def _overlays_of(recipe: str | None, tree: Node, is_alone: bool) -> list[str]:
    """Our overlays that the name of a recipe stands for, where no config says more of it."""
    training = TRAINING_RECIPES.get(bare(recipe or ""))
    if training is None:
        return []
    lora = ["lora"] if is_alone and training.update == "lora" else []
    return lora + (["qat"] if training.qat and not tree.value.keys() & {"quantizer", "qat"} else [])


def _no_default(keys: list[str]) -> Any:
    raise KeyError(".".join(keys))


def _our_recipe(
    recipe: str | None, configs: list[tuple[Place, str]], tree: Node, problems: list[Problem]
) -> str | None:
    """Our recipe for the recipe, configs and keys; None, with a problem, where these are for several methods."""
    if recipe and not is_recipe(recipe) and recipe not in RECIPES:
        return recipe
    named = [(Place(0, "command line"), recipe)] if recipe else []
    found = [
        (place, name, ours)
        for place, name in [*named, *configs]
        if (ours := RECIPES.get(name) and name or recipe_for(name))
    ]
    method, what, place = method_of_file(tree)
    if method and method not in RECIPES:
        problems.append(Problem(place, f"this config is for {method}, a method that is not there yet"))
        return None
    if method:
        found.append((place, what, method))
    for place, name, ours in found[1:]:
        if ours != found[0][2]:
            _, first, theirs = found[0]
            other = "another" if first == theirs else f"the recipe {theirs}"
            text = f"`{name}` belongs to the recipe {ours}, and `{first}` is {other}; take both from one recipe"
            problems.append(Problem(place, text))
            return None
    return found[0][2] if found else "sft"


def _part(node: Node, shipped: bool) -> Node:
    """The tree with only what torchtune's own configs set, or only what the user wrote."""
    entries = {}
    for key, child in node.value.items():
        if isinstance(child.value, dict) and child.value:
            part = _part(child, shipped)
            if part.value:
                entries[key] = part
        elif child.place.shipped == shipped:
            entries[key] = child
    return Node(entries, node.place)


def _component(keys: list[str], node: Node) -> Node:
    """`optimizer=torch.optim.AdamW` as `optimizer._component_=…`."""
    value = node.value
    sections = (
        "optimizer loss lr_scheduler dataset dataset_val model tokenizer checkpointer metric_logger profiler "
        "teacher_model teacher_checkpointer kd_loss ref_checkpointer quantizer"
    ).split()
    if len(keys) == 1 and keys[0] in sections and isinstance(value, str) and "/" not in value:
        if value.startswith("torchtune.") or keys[0] == "optimizer" and "." in value:
            return Node({"_component_": node}, node.place)
    return node
