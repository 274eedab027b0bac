"""`tune cat`: print a complete config, or its JSON Schema."""

from __future__ import annotations

import argparse

from tunesmith.cli import parser
from tunesmith.config import dump, json_schema, load, recipe_name

EXAMPLES = """\
  tune cat sft                              everything sft can be told, with its defaults
  tune cat sft +lora optimizer.lr=1e-4      the same with an overlay and a setting
  tune cat my.yaml --sort                   a file, complete and sorted
  tune cat sft --schema > sft.schema.json   for your editor
  tune cat llama3_1/8B_full                 what a config of torchtune stands for"""


def main(words: list[str]) -> int:
    verb = parser("cat", "Print a complete, resolved config; what still has to be filled in says REQUIRED.", EXAMPLES)
    verb.add_argument("--schema", action="store_true", help="print the JSON Schema of the recipe's config file")
    verb.add_argument("--sort", action="store_true", help="sort the options by name")
    verb.add_argument("words", nargs=argparse.REMAINDER, metavar="RECIPE|FILE [+overlay …] [key=value …]")
    options, rest = verb.parse_known_args(_flags_first(words))
    config = load(rest + options.words, partial=True).config
    if options.schema:
        import json

        print(json.dumps(json_schema(recipe_name(config)), indent=2, ensure_ascii=False))
    else:
        print(dump(config, sort=options.sort), end="")
    return 0


def _flags_first(words: list[str]) -> list[str]:
    flags = ("--schema", "--sort", "-h", "--help")
    return [word for word in words if word in flags] + [word for word in words if word not in flags]
