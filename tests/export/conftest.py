"""Tiny repositories of every family, with tokenizers made here, to be exported."""

import json
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models.conftest import config_json, make_reference
from tunesmith.configs.export import Export
from tunesmith.recipes import export

ROWS = 384
"""Of the embedding; more than there are tokens."""
SENTENCES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "the quick brown fox jumps over the lazy dog; it's 12345 o'clock, they'RE here, aren't they?",
    "def f(x):\n    return x + 1\n\n\n# é ü 你好 🙂\t.",
    "   spaces   and\n\n\nlines\t and 333 33 3 numbers   ",
]
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def byte_level(folder: Path, steps: list, ignore_merges: bool = False) -> Path:
    """A byte-level BPE of 300 tokens whose text is cut by `steps`, its bos put in front, with a chat template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def split(pattern: str) -> list:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def gpt2(folder: Path) -> Path:
    return byte_level(folder, [pre_tokenizers.ByteLevel(add_prefix_space=False)])


def sentencepiece_bpe(folder: Path, size: int = 360, **options) -> Path:
    """A sentencepiece BPE with bytes to fall back on, as Llama 2's and Mistral's are."""
    (folder / "text").write_text("\n".join(SENTENCES * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return folder


def repository(folder: Path, case: str, tokenizer=gpt2, **more) -> Path:
    """A random model of `case` (see tests.models.conftest), saved by transformers, with a tokenizer."""
    folder.mkdir()
    reference = make_reference(case, vocab_size=ROWS, **more)
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_json(reference)))
    return tokenizer(folder)


def run(model: Path, output: Path, **options) -> None:
    export.main(Export(model=str(model), output_dir=str(output), device="cpu", **options))
