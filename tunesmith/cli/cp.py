"""`tune cp`: write a complete config, or a recipe's source, to a file of the user's own."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tunesmith.cli import take_flags
from tunesmith.config import YAML_ENDINGS, dump, find_recipe, load
from tunesmith.configs._check import unfilled
from tunesmith.errors import UserError

HELP = """\
usage: tune cp [-n] [--make-parents] RECIPE|FILE [+overlay …] [key=value …] [~key …] TARGET

Writes a complete config, or (TARGET ends in .py) a recipe's source, to a file of your own.

  -n, --no-clobber   leave a file that exists alone
  --make-parents     make the folders that the file is to stand in

examples:
  tune cp sft +lora model=Qwen/Qwen3-0.6B my.yaml   a complete, commented config: change it, then tune run my.yaml
  tune cp sft my_recipe.py                          the source of the recipe: change it, then tune run ./my_recipe.py my.yaml
  tune cp llama3_1/8B_full ./my_custom_config.yaml  what a config of torchtune stands for
"""


def main(words: list[str]) -> int:
    flags, words = take_flags(words, "-n", "--no-clobber", "--make-parents", "-h", "--help")
    if flags & {"-h", "--help"}:
        print(HELP, end="")
        return 0
    sources, target = _source_and_target(words)
    if target.is_file() and flags & {"-n", "--no-clobber"}:
        print(f"{target} exists and is left alone")
        return 0
    if "--make-parents" in flags:
        target.parent.mkdir(parents=True, exist_ok=True)
    remark = _copy_source(sources, target) if target.suffix == ".py" else _copy_config(sources, target)
    print(f"Copied to {_as_written(words, target)}{remark}")
    return 0


def _as_written(words: list[str], target: Path) -> str:
    """The target as the user wrote it (a Path would lose a leading ./), with the ending that was added."""
    written = next(
        (word for word in reversed(words) if Path(word).expanduser() in (target, target.with_suffix(""))), str(target)
    )
    return written if Path(written).suffix == target.suffix else written + target.suffix


def _source_and_target(words: list[str]) -> tuple[list[str], Path]:
    if len(words) < 2:
        raise UserError("tune cp wants a recipe and the file to write: tune cp sft +lora my.yaml")
    *sources, last = words
    if "=" in last or last.startswith(("+", "~", "-")):
        raise UserError(f"tune cp wants the file to write as its last word, not `{last}`: tune cp sft +lora my.yaml")
    target = Path(last).expanduser()
    if target.is_dir():
        target = target / (Path(sources[0]).stem + ".yaml")
    elif target.suffix not in (".py", *YAML_ENDINGS):
        target = target.with_name(target.name + ".yaml")
    return sources, target


def _copy_config(sources: list[str], target: Path) -> str:
    config = load(sources, partial=True).config
    header = f"Written by `tune cp {' '.join(sources)}`; run it with `tune run {target}`."
    write_file(target, dump(config, header=header.replace("\n", " ")))
    missing = unfilled(config)
    return f"; fill in {', '.join(missing)} before you run it" if missing else ""


def _copy_source(sources: list[str], target: Path) -> str:
    if len(sources) > 1:
        raise UserError(
            f"a recipe's source takes no settings: tune cp {sources[0]} {target}, and write them into a config file"
        )
    from tunesmith.configs.torchtune_names import recipe_for

    recipe = find_recipe(recipe_for(sources[0]) or sources[0])
    source = Path(__file__).parents[1] / "recipes" / f"{recipe.module.rpartition('.')[2]}.py"
    write_file(target, source.read_text(encoding="utf-8"))
    return ""


def write_file(target: Path, text: str) -> None:
    """Write a file of the user's, whole or not at all. Raises UserError where it can't be written."""
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; make it, or add --make-parents")
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout
            target.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")  # so that a full disk leaves what stood there
        os.replace(partial, target.resolve())
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{target}: can't be written ({error.strerror})") from error
