"""Quantization: round a trained model's linear layers to 8 or 4 bits.

    tune run quantize model=Qwen/Qwen3-0.6B scheme.type=int8_weight_only output_dir=q8
    tune run quantize model=run/checkpoints/step-00000100 scheme.type=nf4 output_dir=q4       an adapter is merged first
    tune run quantize model=… scheme.type=int4_weight_only scheme.group_size=128 calibration.method=gptq calibration.data=text.jsonl \\
        perplexity.files=other.txt output_dir=q4
    tune run generate model=q4 prompt="Once upon a time"

What is written is read back and compared with the rounded model in memory; transformers reads it through torchao or bitsandbytes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import check_changes_something
from tunesmith.checkpoint.check import check_rounded_logits, logits_from_files, probe_logits, rounded_tolerance
from tunesmith.checkpoint.load import stated_dtype
from tunesmith.checkpoint.quantized import Written
from tunesmith.configs.quantize import Quantize
from tunesmith.data.tokenizer import Tokenizer, find_tokenizer
from tunesmith.errors import UserError
from tunesmith.eval.perplexity import Perplexity, perplexity
from tunesmith.eval.texts import read_texts
from tunesmith.export.repository import parse_size
from tunesmith.export.source import find_source
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.rounding import linear_layers, rounded
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.device import pick_device, supports_float8
from tunesmith.training.calibrate import calibrate, calibration_samples
from tunesmith.training.convert import replacing, write_model
from tunesmith.training.dtypes import DTYPES
from tunesmith.training.load import load_model, stream_model
from tunesmith.training.preflight import check, check_roundable
from tunesmith.training.progress import format_bytes

LONGEST = 2048
"""Tokens that are read at a time, where the config and the model allow it."""


def main(config: Quantize) -> None:
    check(config)
    scheme, device = Scheme(config.scheme.type, config.scheme.group_size), pick_device(config.device)
    output = Path(config.output_dir).expanduser()
    if scheme.kind.levels == "float8" and not supports_float8(device):
        raise UserError(
            f"`scheme.type: {scheme.type}`: {device.type} has no 8-bit floating-point numbers; set `device=cpu`"
        )
    source = find_source(config.model, config.base)
    check_roundable(config, source.hf_config, source.family, source.config)
    dtype = DTYPES[config.dtype] if config.dtype else stated_dtype(source.hf_config)
    files = config.perplexity.text_files or config.calibration.data_files
    tokenizer = find_tokenizer(config.tokenizer, source.tokenizer) if files else None
    option = "perplexity.files" if config.perplexity.text_files else "calibration.data"
    texts = [text for file in files for text in read_texts(file, option)][: config.perplexity.max_texts]
    samples = read_samples(config, tokenizer) if tokenizer and config.calibration.method != "none" else None

    load = load_model if tokenizer else stream_model  # for a few tokens weights may stay in their files
    model = load(source.folder, device=device, base=source.base, dtype=dtype)
    if source.base is not None:
        check_changes_something(model)

    def measure(one: CausalLM) -> Perplexity | None:
        length = config.perplexity.max_seq_len or min(LONGEST, source.config.context_length)
        return perplexity(one, tokenizer, texts, length) if tokenizer else None

    plain, before = probe_logits(model), measure(model)
    chosen = calibrate(model, samples, scheme) if samples is not None else {}
    with rounded(model, scheme, chosen):
        ours = probe_logits(model)
    shard_size = parse_size(config.max_shard_size)
    with replacing(output, only_empty=True) as folder:
        written = write_model(model, folder, scheme, dtype, source.weights, source.tokenizer, shard_size, chosen)
        tolerance = config.tolerance or rounded_tolerance(scheme, dtype)
        difference = check_rounded_logits(ours, logits_from_files(folder, device), tolerance, str(output))
        after = measure(load_model(folder, device=device)) if tokenizer else None
    print(f"wrote {output}: {scheme}{_method(config)}, {_layers(model, written)}")
    print(_size(written, dtype))
    if before is not None and after is not None:
        told = f"{before.perplexity:.5g} before, {after.perplexity:.5g} after"
        print(f"perplexity: {told} ({after.tokens} tokens of {_text(config)})")
    largest, off = plain.abs().max(), (ours - plain).abs().max()
    print(f"largest difference of a logit from the model before: {off:.3g}, where the largest is {largest:.3g}")
    memory = f"{difference:.1e} of their size from those of the rounded model in memory"
    print(f"read back: the logits differ by {memory} (tolerance {tolerance:.0e})")


def read_samples(config: Quantize, tokenizer: Tokenizer) -> Tensor:
    """Ids (B, T) of the text that the rounding heeds."""
    own = config.calibration
    texts = [text for file in own.data_files for text in read_texts(file, "calibration.data")]
    return calibration_samples(tokenizer, texts, own.num_samples, own.max_seq_len, config.seed or 0)


def _method(config: Quantize) -> str:
    own = config.calibration
    return "" if own.method == "none" else f", by {own.method} on {own.num_samples} x {own.max_seq_len} tokens"


def _text(config: Quantize) -> str:
    if not config.perplexity.text_files:
        return "the calibration's own text, which it has seen: name others in `perplexity.files`"
    return ", ".join(config.perplexity.text_files)


def _layers(model: CausalLM, written: Written) -> str:
    """How many layers are quantized, and which are not, those of all blocks as one."""
    left = [model.head_name, *(name for name in linear_layers(model) if name not in written.layers)]
    names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in left)
    return f"{len(written.layers)} linear layers; left as they are: {', '.join(names)}"


def _size(written: Written, dtype: torch.dtype) -> str:
    """What is saved: of int4, too, torchao's files hold a byte a number."""
    each = written.quantized_size / written.quantized_count
    sizes = f"{format_bytes(written.size)} instead of {format_bytes(written.plain_size)} in {str(dtype).removeprefix('torch.')}"
    return f"size of the weights: {sizes}; a quantized weight takes {each:.3f} bytes"
