"""`tune run`: load the config, then start the recipe here or on the processes that torchrun's options ask for."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from tunesmith.cli import torchrun
from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.config import Loaded

HELP = """\
usage: tune run [torchrun options] RECIPE|FILE [+overlay …] [key=value …] [~key …] [--preview [N]]

Runs a recipe. Layers merge in the order written: the recipe's defaults, a file (or --config FILE), +overlays, all key=value.

  RECIPE        sft, preference, generate, evaluate, quantize, … (`tune ls` names all), or your own recipe file (./my_recipe.py)
  FILE          a YAML file that says which `recipe` it is for, as `tune cp` writes it
  +overlay      several settings at once, such as +lora or +low_memory; also +my_overlay.yaml
  key=value     one setting, such as batch_size=4 or optimizer.lr=1e-4; lists and sections as in YAML: [a, b] {a: b}
  ~key          back to the option's plain default (in zsh write '~key', and quote [a, b])
  --preview [N] show N training rows as tokens, coloured by what is trained, and stop (default 3)

torchrun's options (--nproc_per_node, --nnodes, …) come before the recipe; without them the recipe runs in this process.

examples:
  tune run sft model=Qwen/Qwen3-0.6B dataset.source=alpaca.jsonl
  tune run sft +lora model=Qwen/Qwen3-8B dataset.source=alpaca.jsonl batch_size=4 optimizer.lr=1e-4
  tune run --nproc_per_node 8 sft +qlora model=Qwen/Qwen3-32B dataset.source=chats.jsonl
  tune run my.yaml max_steps=100
  tune run ./my_recipe.py my.yaml
  tune run generate model=run/checkpoints/latest 'prompt=Once upon a time'
  tune run lora_finetune_single_device --config llama3_2/1B_lora_single_device      torchtune's commands work as written

`tune ls RECIPE` lists a recipe's options; `tune validate …` takes the same words and runs nothing.
"""


def main(words: list[str]) -> int:
    launch, rest = torchrun.split(words)
    preview, rest = _take_preview(rest)
    if not rest or "-h" in rest or "--help" in rest:
        return _help([word for word in rest if word not in ("-h", "--help")])
    _importable_from_here()
    from tunesmith.config import dump, load
    from tunesmith.training import preflight

    loaded = load(rest)
    launches = torchrun.is_asked_for(launch)
    preflight.check(
        loaded.config,
        torchrun.processes(launch) if launches else None,
        folder_is_checked_later=launches and torchrun.value(launch, "--nnodes") not in (None, "1", "1:1"),
    )
    if preview is not None:
        from tunesmith.data.preview import preview as show_preview  # pyright: ignore[reportMissingImports]

        show_preview(loaded.config, preview)
        return 0
    if launches:
        from tunesmith.cli.launch import launch_workers

        return launch_workers(launch, dump(loaded.config))
    return start(loaded)


def start(loaded: Loaded) -> int:
    """Call the recipe's main(config) in this process."""
    from tunesmith.config import own_module

    module: Any = own_module(loaded.file) if loaded.file else importlib.import_module(loaded.recipe.module)
    module.main(loaded.config)
    return 0


def _importable_from_here() -> None:
    """Classes named by dotted path may stand in files of the working folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _take_preview(words: list[str]) -> tuple[int | None, list[str]]:
    """The number behind --preview (None without it), and the other words."""
    for index, word in enumerate(words):
        if word == "--preview":
            number = words[index + 1] if index + 1 < len(words) and words[index + 1].isdigit() else None
            return int(number or 3), words[:index] + words[index + 1 + (number is not None) :]
        if word.startswith("--preview="):
            if not word.partition("=")[2].isdigit():
                raise UserError(f"`{word}`: --preview takes a number of rows")
            return int(word.partition("=")[2]), words[:index] + words[index + 1 :]
    return None, words


def _help(names: list[str]) -> int:
    print(HELP, end="")
    if names:
        from tunesmith.cli.ls import show_options

        print()
        show_options(names[0])
    return 0
