"""The command `tune`: picks the verb and turns mistakes into one message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from tunesmith.errors import UserError, fault_of_the_machine

VERBS = {
    "run": "train, generate, evaluate, quantize or export with a recipe",
    "ls": "list recipes, overlays, models and data sets; `tune ls sft`: the options of a recipe",
    "cp": "write a complete config, or a recipe's source, to make your own",
    "cat": "print a complete config, or its JSON Schema",
    "slurm": "write an sbatch script that runs a recipe on the nodes of a SLURM job",
    "validate": "check everything that can be checked before a run starts",
    "import": "turn a training config of torchtitan into one of ours",
    "download": "fetch a model from the Hugging Face Hub or Kaggle",
    "completion": "print a script that completes `tune` in bash or zsh",
}
"""{verb: one sentence}; a verb is the module of that name, imported when it is used."""

HELP = """\
usage: tune VERB …

fine-tune, pre-train and use language models

{verbs}

examples:
  tune download Qwen/Qwen3-0.6B
  tune run sft +lora model=Qwen/Qwen3-0.6B dataset.source=alpaca_cleaned
  tune run --nproc_per_node 8 sft model=Qwen/Qwen3-8B dataset.source=chats.jsonl
  tune cp sft +lora model=Qwen/Qwen3-0.6B my.yaml && tune run my.yaml

`tune VERB --help` says more about each; `tune --version` prints the version.
"""


def help_text() -> str:
    return HELP.format(verbs="\n".join(f"  {name:<11} {text}" for name, text in VERBS.items()))


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for the user's mistake, 130 after Ctrl-C; a bug keeps its traceback."""
    words = sys.argv[1:] if words is None else words
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # tune ls | head
        _close_stdout()
        return 141
    except OSError as error:
        if (explained := fault_of_the_machine(error)) is None:
            raise
        print(explained, file=sys.stderr)
        return 2


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    verb, *rest = words
    if verb == "--version":
        from tunesmith import __version__

        print(f"tunesmith {__version__}")
        return 0
    return find_verb(verb)(rest) or 0


def find_verb(verb: str) -> Callable[[list[str]], int | None]:
    """The function of a verb; UserError with the nearest one where there is none."""
    if verb not in VERBS:
        from tunesmith.configs._suggest import did_you_mean
        from tunesmith.configs.recipes import RECIPES

        if verb in RECIPES:
            raise UserError(f"`{verb}` is a recipe: write `tune run {verb} …`")
        raise UserError(f"`tune` has no verb `{verb}`{did_you_mean(verb, VERBS)}; there are {', '.join(VERBS)}")
    module = "import_" if verb == "import" else verb  # Python keeps that word for itself
    return importlib.import_module(f"tunesmith.cli.{module}").main


def _close_stdout() -> None:
    """Let the interpreter's own flush at exit go nowhere instead of failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
