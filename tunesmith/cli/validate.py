"""`tune validate`: check a config, its files and its folders without loading weights."""

from __future__ import annotations

import os
import sys

from tunesmith.cli import torchrun

HELP = """\
usage: tune validate [torchrun options] RECIPE|FILE [+overlay …] [key=value …] [~key …]

Takes exactly what `tune run` takes and checks everything that can be checked without loading weights:
options and how they go together, the model's folder and its weight files, data, templates, packages, the output folder.
Every finding is shown at once; exit code 2 if there is one.

examples:
  tune validate my.yaml
  tune validate sft +lora model=Qwen/Qwen3-0.6B dataset.source=alpaca.jsonl
"""


def main(words: list[str]) -> int:
    launch, rest = torchrun.split(words)
    if not rest or "-h" in rest or "--help" in rest:
        print(HELP, end="")
        return 0
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from tunesmith.config import load
    from tunesmith.training import preflight

    loaded = load(rest)
    notes = preflight.check(loaded.config, torchrun.processes(launch) if torchrun.is_asked_for(launch) else None)
    print(f"valid: {loaded.recipe.name} of {loaded.config.model}")
    for note in notes:
        print(f"  {note}")
    return 0
