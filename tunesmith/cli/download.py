"""`tune download`: fetch a model, or only its tokenizer, and say where it is."""

from __future__ import annotations

import os
from pathlib import Path

from tunesmith.cli import parser
from tunesmith.errors import UserError
from tunesmith.hub import TOKENIZER_AND_SETTINGS, download, download_from_kaggle

EXAMPLES = """\
  tune download Qwen/Qwen3-0.6B                               into the Hub cache, where model=Qwen/Qwen3-0.6B finds it
  tune download Qwen/Qwen3-0.6B --output-dir models/qwen      into a folder: model=models/qwen
  tune download meta-llama/Llama-3.2-1B-Instruct --hf-token … a gated model (or set HF_TOKEN)
  tune download meta-llama/Llama-3.1-8B --ignore-patterns "original/*"
  tune download Qwen/Qwen3-0.6B --tokenizer-only
  tune download metaresearch/llama-3.2/pytorch/1b --source kaggle

HF_ENDPOINT (a mirror), HF_HOME, HF_HUB_OFFLINE are honoured; an interrupted download goes on where it stopped."""


def main(words: list[str]) -> int:
    options = _parser().parse_args(words)
    if options.source == "kaggle":
        return _from_kaggle(options)
    allowed = [*(options.allow_patterns or []), *(TOKENIZER_AND_SETTINGS if options.tokenizer_only else ())]
    ignored = list(options.ignore_patterns or [])
    if options.tokenizer_only:
        ignored += ["*.safetensors", "*.bin", "*.pth", "*.gguf"]
    where = download(
        options.repo,
        folder=Path(options.output_dir).expanduser() if options.output_dir else None,
        revision=options.revision,
        token=options.hf_token or os.environ.get("HF_TOKEN"),
        allow_patterns=allowed or None,
        ignore_patterns=ignored or None,
    )
    print(f"{options.repo} is in {where}")
    return 0


def _parser():
    verb = parser("download", "Fetch a model from the Hugging Face Hub or Kaggle, and say where it is.", EXAMPLES)
    verb.add_argument("repo", help="repository, such as Qwen/Qwen3-0.6B; for Kaggle owner/model/framework/variation")
    verb.add_argument("--output-dir", metavar="DIR", help="folder for the files (default: the Hub cache)")
    verb.add_argument(
        "--hf-token", metavar="TOKEN", help="token of the Hub (default: HF_TOKEN, or the one you logged in with)"
    )
    verb.add_argument("--ignore-patterns", metavar="GLOB", action="extend", nargs="+", help="files to leave out")
    verb.add_argument("--allow-patterns", metavar="GLOB", action="extend", nargs="+", help="the only files to fetch")
    verb.add_argument("--tokenizer-only", action="store_true", help="only the tokenizer and config.json, no weights")
    verb.add_argument("--revision", help="branch, tag or commit")
    verb.add_argument(
        "--source", choices=["huggingface", "kaggle"], default="huggingface", help="where from (default: huggingface)"
    )
    verb.add_argument("--kaggle-username", metavar="NAME", help="default: KAGGLE_USERNAME")
    verb.add_argument("--kaggle-api-key", metavar="KEY", help="default: KAGGLE_KEY")
    return verb


def _from_kaggle(options) -> int:
    ours = {
        "--output-dir": options.output_dir,
        "--ignore-patterns": options.ignore_patterns,
        "--allow-patterns": options.allow_patterns,
    }
    refused = [name for name, value in (*ours.items(), ("--tokenizer-only", options.tokenizer_only)) if value]
    if refused:
        raise UserError(
            f"{', '.join(refused)} can't be combined with --source kaggle: kagglehub fetches whole models into its own cache"
        )
    for variable, value in (("KAGGLE_USERNAME", options.kaggle_username), ("KAGGLE_KEY", options.kaggle_api_key)):
        if value:
            os.environ[variable] = value
    print(f"{options.repo} is in {download_from_kaggle(options.repo)}")
    return 0
