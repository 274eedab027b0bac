"""`tune ls`: what there is: recipes, overlays, models, data sets; or the options of one recipe."""

from __future__ import annotations

import os
import sys
from typing import Any

from tunesmith.cli import take_flags
from tunesmith.configs import grid
from tunesmith.configs import torchtune_names as torchtune
from tunesmith.configs.recipes import LATER_RECIPES, RECIPES, Recipe, find_recipe, overlays
from tunesmith.errors import UserError

HELP = """\
usage: tune ls [RECIPE]

Lists what there is; with a recipe's name, its options.

examples:
  tune ls                                 recipes, overlays, models, data sets
  tune ls sft                             the options of sft, one sentence each
  tune ls lora_finetune_single_device     torchtune's names answer too
"""


_RECIPE_OF = {"chat": "sft", "text": "pretrain", "preference": "preference"}


def main(words: list[str]) -> int:
    helps, words = take_flags(words, "-h", "--help")
    if helps:
        print(HELP, end="")
    elif len(words) > 1 or words and words[0].startswith("-"):
        raise UserError(f"tune ls takes the name of one recipe, not `{' '.join(words)}`; see `tune ls --help`")
    elif words:
        show_options(words[0])
    else:
        _show_all()
    return 0


def _show_all() -> None:
    from tunesmith.data.named import NAMED
    from tunesmith.models.families import named_sizes

    _section("RECIPES", {recipe.name: recipe.summary for recipe in RECIPES.values()})
    print(
        "GRID   every method trains every kind of weights, on every layout: one process, FSDP, copies, tensor, context, pipeline"
    )
    for line in grid.plain():
        print(f"  {line}")
    print()
    _section("OVERLAYS", {f"+{name}": text for name, text in overlays().items()})
    print(
        "MODELS   any folder or Hub id of these families; the named sizes also train from scratch (pretrain model=llama3_2/1B)"
    )
    _families(named_sizes())
    print("DATA SETS   dataset.source takes a file, a folder, a Hub id, or one of these names")
    _section(
        "",
        {
            name: f"{entry.description} ({entry.repository}, for {_RECIPE_OF[entry.kind]})"
            for name, entry in NAMED.items()
        },
    )
    print(
        "torchtune's config names work as --config, for `tune cp` and `tune cat`: FAMILY/SIZE_UPDATE[_single_device], such as"
    )
    print("  llama3_2/1B_lora_single_device; UPDATE is one of full, full_low_memory, lora, qlora, dora, qdora; also")
    print("  SIZE_lora_dpo and SIZE_full_dpo, SIZE_qat_full and SIZE_qat_lora, TEACHER_to_SIZE_KD_lora")
    print()
    print("`tune ls RECIPE` lists a recipe's options")


def _section(title: str, entries: dict[str, str]) -> None:
    if title:
        print(title)
    width = max((len(name) for name in entries), default=0) + 2
    for name, text in entries.items():
        print(f"  {name:<{width}}{text}".rstrip())
    print()


def _families(sizes: dict[str, Any]) -> None:
    """One line a family, its sizes behind it."""
    families: dict[str, list[str]] = {}
    for name in sizes:
        family, _, size = name.rpartition("/")
        families.setdefault(family, []).append(size)
    _section("", {family: "  ".join(names) for family, names in families.items()})


# --- one recipe ----------------------------------------------------------------------------------


def show_options(name: str) -> None:
    """Print the options of a recipe, one sentence each; a recipe of torchtune answers with what it is here."""
    ours = torchtune.recipe_for(name)
    if ours is None and torchtune.is_recipe(name):
        from tunesmith.config import load

        load([name])  # says which method is not there yet
    if ours and name not in RECIPES:
        print(f"torchtune's {name} is the recipe {ours} here{_how(name)}\n")
    _show_recipe(find_recipe(ours or name))


def _how(name: str) -> str:
    training = torchtune.TRAINING_RECIPES.get(torchtune.bare(name))
    if training is None:
        return ""
    lora = "+lora (or +dora, …)" if training.qat else "+lora (or +qlora, +dora, …)"
    overlays = [lora] * (training.update == "lora") + ["+qat"] * training.qat
    return f", with {' and '.join(overlays)}" if overlays else ""


def _show_recipe(recipe: Recipe) -> None:
    from tunesmith.configs import _schema as schema

    cls = recipe.config_class
    print(f"{recipe.name}: {schema.summary(cls)}")
    if recipe.name in LATER_RECIPES:
        return
    _lines(cls, "")
    print(
        f"\n`tune cat {recipe.name}` prints them with their defaults; `tune cp {recipe.name} my.yaml` writes them to a file of yours"
    )


def _lines(cls: type, prefix: str, skip: tuple[str, ...] = ()) -> None:
    from tunesmith.configs import _schema as schema

    sentences, hints = schema.sentences(cls), schema.hints(cls)
    for field in schema.fields(cls):
        if field.name in skip:
            continue
        hint, dotted = hints[field.name], prefix + field.name
        classes = schema.choices(hint)
        default = schema.default_of(field)
        sections = [member for member in schema.members(hint) if schema.is_section(member)]
        _line(dotted, sentences.get(field.name, ""), "" if sections else _default(default))
        if classes:
            _choices(classes, dotted)
        elif sections:
            _lines(sections[0], f"{dotted}.") if field.name != "dataset_val" else None


def _choices(classes: dict[str, type], dotted: str) -> None:
    """Every `type` with its sentence, then every option that one of them has, once."""
    from tunesmith.configs import _schema as schema

    for name, cls in classes.items():
        _line(f"{dotted}.type={name}", schema.summary(cls), "")
    seen: tuple[str, ...] = ()
    for cls in classes.values():
        _lines(cls, f"{dotted}.", skip=seen)
        seen += tuple(schema.hints(cls))


def _default(value: Any) -> str:
    from tunesmith.configs import _schema as schema
    from tunesmith.configs._write import flow

    return "required" if value is schema.MISSING else flow(schema.plain(value))


def _line(dotted: str, sentence: str, default: str) -> None:
    import textwrap

    width = max(60, min(_columns(), 160))
    text = sentence + (f" [{default}]" if default else "")
    left = 34
    first = f"  {dotted}" + " " * max(2, left - 2 - len(dotted))
    wrapped = textwrap.wrap(text, width, initial_indent=" " * len(first), subsequent_indent=" " * left) or [""]
    print((first + wrapped[0].lstrip()).rstrip())
    for line in wrapped[1:]:
        print(line)


def _columns() -> int:
    """As shutil.get_terminal_size, which would import every compressor."""
    if (given := os.environ.get("COLUMNS", "")).isdigit() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 120  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 120
