"""`tune cat`: print a complete config, or its JSON Schema."""

from __future__ import annotations

from tunesmith.cli import take_flags
from tunesmith.config import dump, json_schema, load, recipe_name

HELP = """\
usage: tune cat [--schema] [--sort] RECIPE|FILE [+overlay …] [key=value …] [~key …]

Prints a complete, resolved config; what still has to be filled in says REQUIRED.

  --schema      print the JSON Schema of the recipe's config file instead
  --sort        sort the options by name

examples:
  tune cat sft                              everything sft can be told, with its defaults
  tune cat sft +lora optimizer.lr=1e-4      the same with an overlay and a setting
  tune cat my.yaml --sort                   a file, complete and sorted
  tune cat sft --schema > sft.schema.json   for your editor
  tune cat llama3_1/8B_full                 what a config of torchtune stands for
"""


def main(words: list[str]) -> int:
    flags, words = take_flags(words, "--schema", "--sort", "-h", "--help")
    if flags & {"-h", "--help"}:
        print(HELP, end="")
        return 0
    config = load(words, partial=True).config
    if "--schema" in flags:
        import json

        print(json.dumps(json_schema(recipe_name(config)), indent=2, ensure_ascii=False))
    else:
        print(dump(config, sort="--sort" in flags), end="")
    return 0
