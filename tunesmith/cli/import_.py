"""`tune import`: a torchtitan TOML file as a config of ours."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.cli import take_flags
from tunesmith.errors import UserError

HELP = """\
usage: tune import FILE.toml [TARGET.yaml]

Turns a training config of torchtitan (TOML, keys of July 2025) into a complete, commented config of `tune run pretrain`,
printed or written. What has no counterpart is told, one sentence each, with its line.

examples:
  tune import llama3_8b.toml my.yaml && tune run --nproc_per_node 8 my.yaml
  tune import debug_model.toml
"""


def main(words: list[str]) -> int:
    flags, words = take_flags(words, "-h", "--help")
    if flags:
        print(HELP, end="")
        return 0
    if not 1 <= len(words) <= 2 or any(word.startswith("-") for word in words):
        raise UserError(
            "tune import wants a TOML file and, if you like, the file to write: tune import run.toml my.yaml"
        )
    from tunesmith.config import dump, load_settings
    from tunesmith.configs._check import unfilled
    from tunesmith.configs.torchtitan import import_toml

    source = Path(words[0]).expanduser()
    imported = import_toml(source)
    config = load_settings("pretrain", imported.settings)
    told = [str(note) for note in imported.notes]
    header = [f"Imported from {source} by `tune import`.", *(f"- {note}" for note in told)]
    text = dump(config, header="\n".join(header))
    print(*told, sep="\n", end="\n" if told else "", file=sys.stderr)
    if len(words) == 1:
        print(text, end="")
        return 0
    from tunesmith.cli.cp import write_file

    target = Path(words[1]).expanduser()
    write_file(target, text)
    missing = unfilled(config)
    print(f"Written to {target}" + (f"; fill in {', '.join(missing)} before you run it" if missing else ""))
    return 0
