"""A GGUF file read by llama.cpp: its tokens are the tokenizer's, its logits those of our own engine with the weights that the file holds."""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith.checkpoint.check import probe_ids, probe_logits
from tunesmith.checkpoint.streamed import stream_weights
from tunesmith.checkpoint.tensor_files import HeldTensor
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.export.gguf.tensors import Placed, Written
from tunesmith.export.result import Check
from tunesmith.export.source import Source
from tunesmith.models.decoder import CausalLM, build
from tunesmith.training.dtypes import default_dtype

TOLERANCES = {"f32": 2e-3, "f16": 1e-2, "bf16": 3e-2}
"""Largest difference of llama.cpp's logits from ours with the same weights. It rounds inputs of matrices to the matrix's type."""
QUANTIZED_TOLERANCE = 1e-1
"""The same where matrices are quantized: their inputs are rounded to 8 bits."""
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "Hello, world! It's 12345 o'clock; they'RE here,   aren't they?",
    "def f(x):\n    return x + 1\n\n\n# é ü 你好 🙂\t.",
    " leading and trailing ",
)


def check_file(
    path: Path,
    source: Source,
    tokenizer: Tokenizer,
    placed: list[Placed],
    stored: dict[str, Written],
    type: str,
    context: int,
    tolerance: float | None,
) -> tuple[list[Check], list[str]]:
    """The checks that llama.cpp passed on texts of up to `context` tokens, and what to tell of them; where its binding is not installed, that. Raises UserError where one fails."""
    if importlib.util.find_spec("llama_cpp") is None:
        return [], ["llama.cpp's binding is not installed, so the file was not run: pip install 'tunesmith[llama]'"]
    ids = probe_ids(source.config.vocab_size)[0, :context].tolist()
    asked = [(text, True) for text in TEXTS]
    chat = rendered_chat(tokenizer)
    tokens, theirs = ask(path, [*asked, (chat, False)], ids, source.config.vocab_size)
    for text, own in zip(TEXTS, tokens):
        ours = tokenizer.encode(text)
        if own != ours:
            raise UserError(
                f"llama.cpp cuts {text!r} into other tokens than the tokenizer ({own} instead of {ours}): nothing was written; report it"
            )
    notes = [f"llama.cpp cuts {len(TEXTS)} texts into the same tokens"]
    if tokens[-1] != tokenizer.encode(chat, add_special_tokens=False):
        notes.append(
            "llama.cpp cuts a chat into other tokens than the tokenizer: it puts a space between a special token and text"
        )
    ours = probe_logits(model_of(source, placed, stored))[0, :context]
    difference = ((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-30)).item()
    allowed = tolerance or TOLERANCES.get(type, QUANTIZED_TOLERANCE)
    return [Check("llama.cpp", "logits", difference, allowed)], notes


def rendered_chat(tokenizer: Tokenizer) -> str:
    """A short conversation as text, as the chat template writes it; empty where there is none."""
    if tokenizer.chat_template is None:
        return ""
    return tokenizer.render_chat([{"role": "user", "content": "Hello, who are you?"}], add_generation_prompt=True)


def ask(
    path: Path,
    texts: Sequence[tuple[str, bool]],
    ids: list[int],
    vocab_size: int,
    n_ctx: int = 64,
    lora: Path | None = None,
) -> tuple[list[list[int]], Tensor]:
    """What llama.cpp says to the file at `path`: the tokens of each of `texts` (text, whether bos goes in front), and the logits (T, V) of `ids`."""
    asked = {"path": str(path), "texts": texts, "ids": ids, "n_ctx": n_ctx, "lora": str(lora) if lora else None}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "tunesmith.export.gguf.probe", str(answer)]
        ran = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, check=False)
        if ran.returncode != 0 or not answer.is_file():
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            told = [line for line in said if "error" in line.lower() or "assert" in line.lower()] or said
            raise UserError(
                f"llama.cpp does not load the file: {told[-1] if told else ran.returncode}; nothing was written; report it"
            )
        found = json.loads(answer.read_text())
    logits = np.frombuffer(base64.b64decode(found["logits"]), dtype=np.float32).reshape(len(ids), vocab_size)
    return found["tokens"], torch.from_numpy(logits.copy())


def model_of(source: Source, placed: list[Placed], stored: dict[str, Written]) -> CausalLM:
    """Our own model of the file, in float32: each weight is read from it when it is needed."""
    own_head = any(one.name == "lm_head.weight" for one in placed)
    hf_config = {**source.hf_config, "tie_word_embeddings": not own_head}
    with torch.device("meta"), default_dtype(torch.float32):
        model = build(hf_config, source.family, source.family.read_config(hf_config))

    def held(one: Placed) -> HeldTensor:
        return HeldTensor(
            Path(one.gguf), one.name, torch.float32, torch.Size(one.shape), lambda: one.back(stored[one.gguf].dense())
        )

    stream_weights(model, {one.name: held(one) for one in placed})
    model.init_buffers("cpu")
    return model.requires_grad_(False).eval()
