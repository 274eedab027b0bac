"""Make what `make quickstart` uses: the tiny base model and the instruction set that ship in tunesmith/assets.

    python scripts/make_tiny_model.py                 everything: about 15 minutes on one CPU core
    python scripts/make_tiny_model.py --only data     the instruction set alone: seconds

The same seed writes the same text, tokenizer and instruction set anywhere, and on the same machine, with the same versions and number
of threads, the same weights (those that ship: OMP_NUM_THREADS=1; with tensors this small more threads help little). What is in between (text, run folder with curves) stays in build/tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tiny.instructions import write_part
from tiny.text import Writer
from tiny.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE, train_tokenizer

import tunesmith

SEED = 1
SCRIPTS = Path(__file__).resolve().parent
ASSETS = SCRIPTS.parent / "tunesmith" / "assets"
WORK = SCRIPTS.parent / "build" / "tiny"
TRAIN_ROWS, TEST_ROWS = 100, 16
"""Rows a task of the instruction set."""
DOCUMENTS, VALIDATION_DOCUMENTS, TOKENIZER_DOCUMENTS = 120_000, 500, 20_000

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index("<|end|>"),
    "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", choices=["data", "model", "export"], help="make only this part; export: the model of build/tiny/run"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="options of the pretrain recipe, such as max_steps=20"
    )
    options = parser.parse_args()
    if options.only in (None, "data"):
        write_instructions()
    if options.only in (None, "model"):
        start_afresh(WORK)
        write_text()
        write_blank_model()
        pretrain(options.settings)
    if options.only in (None, "model", "export"):
        export()


def write_instructions() -> None:
    """The training and the held-out part of the instruction set, the training part in mixed order."""
    train, test = list(write_part(SEED, TRAIN_ROWS, False)), list(write_part(SEED, TEST_ROWS, True))
    random.Random(SEED).shuffle(train)
    write_rows(ASSETS / "quickstart" / "train.jsonl", train)
    write_rows(ASSETS / "quickstart" / "test.jsonl", test)


def write_text() -> None:
    """The text to read, a document a row, and other text from the same hand for validation."""
    for name, count, seed in (("train", DOCUMENTS, SEED), ("validation", VALIDATION_DOCUMENTS, SEED + 1)):
        writer = Writer(random.Random(seed))
        write_rows(WORK / f"{name}.jsonl", ({"text": writer.document()} for _ in range(count)))


def write_blank_model() -> None:
    """A model repository without weights: config.json and the tokenizer."""
    folder = WORK / "blank"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    writer = Writer(random.Random(SEED + 2))
    train_tokenizer((writer.document() for _ in range(TOKENIZER_DOCUMENTS)), folder, MODEL["max_position_embeddings"])


def pretrain(settings: list[str]) -> None:
    """`tune run scripts/tiny/pretrain.yaml` with the text and the blank model of above."""
    config = tunesmith.load_config(
        SCRIPTS / "tiny" / "pretrain.yaml",
        f"model={WORK / 'blank'}",
        f"dataset.source={WORK / 'train.jsonl'}",
        f"dataset_val.source={WORK / 'validation.jsonl'}",
        f"output_dir={WORK / 'run'}",
        *settings,
    )
    tunesmith.run(config)


def export() -> None:
    """The newest checkpoint in bf16, as `tune run export` writes it, into the package."""
    from tunesmith.checkpoint.resume import find_newest

    shutil.rmtree(WORK / "model", ignore_errors=True)
    config = tunesmith.load_config(
        "export", f"model={find_newest(WORK / 'run')}", f"output_dir={WORK / 'model'}", "dtype=bf16"
    )
    tunesmith.run(config)
    start_afresh(ASSETS / "tiny")
    for path in sorted((WORK / "model").iterdir()):
        if path.is_file():
            shutil.copyfile(path, ASSETS / "tiny" / path.name)
    print(f"the tiny model: {ASSETS / 'tiny'}", file=sys.stderr)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def start_afresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


if __name__ == "__main__":
    main()
