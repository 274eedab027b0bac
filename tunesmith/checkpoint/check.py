"""What was saved, read back: checksums, and logits compared with the model in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.checkpoint.load import prepare_quantized, read_model_config, stated_dtype, stored_weights
from tunesmith.checkpoint.streamed import stream_weights
from tunesmith.checkpoint.tensor_files import sha256_of
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM, build
from tunesmith.nn.part import let_go
from tunesmith.nn.scheme import Scheme
from tunesmith.parallel.mesh import Ranks

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits read back, relative to the largest logit; rounding alone stays below it."""

_JUMPS = {"int4": 5e-2, "int8": 5e-2, "float8": 1.5e-1}
"""By levels of the weights, the same in half precision where inputs are rounded, of which the last digit may make a level of difference.
Inputs that differed by 2^-9 of themselves, as those of bf16 do, moved logits of small trained models by 0.7 to 1 % (8-bit whole numbers)
and 2.2 to 3.1 % (float8), of a random one by 3.3 and 9.6 %."""


def rounded_tolerance(scheme: Scheme, dtype: torch.dtype) -> float:
    """What `check_rounded_logits` allows a model of `scheme` that computes in `dtype`."""
    if not scheme.rounds_inputs:
        return TOLERANCES[dtype]
    return 1e-2 if dtype == torch.float32 else _JUMPS[scheme.kind.levels]


def verify(folder: str | Path, digests: Mapping[str, str]) -> None:
    """Read the named files again and compare their sha256. Raises UserError for one that is missing or differs."""

    def check(item: tuple[str, str]) -> None:
        path = Path(folder) / item[0]
        if not path.is_file():
            raise UserError(f"{path} is missing: {folder} is not complete; use another checkpoint, or save it again")
        if sha256_of(path) != item[1]:
            raise UserError(
                f"{path} is not what was written (its checksum differs): use another checkpoint, or save it again on a sound disk"
            )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, digests.items()):
            pass


def probe_ids(vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed token ids (1, 24) on which models are compared."""
    return (torch.arange(24, device=device)[None] * 7919 + 1) % vocab_size


@torch.no_grad()
def probe_logits(model: CausalLM) -> Tensor:
    """Logits (1, 24, V), float32 on the CPU, of `model` without dropout on the fixed ids."""
    was_training = model.training
    model.eval()
    try:
        ids = probe_ids(model.config.vocab_size, model.model.device)
        return model.logits(ids).float().cpu()
    finally:
        let_go(model)
        model.train(was_training)


def logits_from_files(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """Logits (1, 24, V) of the repository in `folder` on the fixed ids: config.json and weights are read from the files alone.

    The weights stay in the files, and only the module at work has its own in memory (in `dtype`: default, that of config.json).
    """
    hf_config, family, config = read_model_config(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or stated_dtype(hf_config))
    try:
        with torch.device("meta"):
            model = build(hf_config, family, config)
    finally:
        torch.set_default_dtype(before)
    prepare_quantized(model, folder)
    stream_weights(model, stored_weights(model, folder, family), device)
    model.init_buffers(device)
    return probe_logits(model)


def check_logits(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> float:
    """Largest difference of two (…, V) logits, relative to the largest of `ours`. Raises UserError above `tolerance`, or where one is not finite."""
    difference = ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30)).item()
    if not difference <= tolerance:
        raise UserError(
            f"{what} gives other logits than the model in memory: they differ by {difference:.2e} of the largest, more than {tolerance:.0e}; "
            "don't use these files, save again, and if that doesn't help report it"
        )
    return difference


def check_rounded_logits(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> float:
    """The size of the difference of two (…, V) logits relative to that of `ours`, as `check_logits` but of all together.

    For models that round what they compute with: of a number half-way between two levels the last digit, which depends on the
    layout, decides, so that single logits may differ by a step.
    """
    difference = ((ours - theirs).norm() / ours.norm().clamp_min(1e-30)).item()
    if not difference <= tolerance:
        raise UserError(
            f"{what} gives other logits than the model in memory: they differ by {difference:.2e} of their size, more than {tolerance:.0e}; "
            "don't use these files, take those of the checkpoint, and report it"
        )
    return difference


def check_saved(
    model: CausalLM, folder: str | Path, tolerance: float | None = None, ranks: Ranks | None = None
) -> float:
    """Read the repository in `folder` back and compare its logits with those of `model`; return the largest relative difference.

    tolerance: default by the number types, see TOLERANCES. No second copy of the model is held. ranks: those that hold the model
    together, all of which call this. Raises UserError for a difference above the tolerance.
    """
    if tolerance is None:
        types = (stated_dtype(read_model_config(folder)[0]), model.model.compute_dtype)
        tolerance = max(TOLERANCES.get(dtype, 1e-4) for dtype in types)
    ours, device = probe_logits(model), model.model.device

    def compare() -> float:
        return check_logits(ours, logits_from_files(folder, device), tolerance, str(folder))

    return (ranks or Ranks()).from_main(compare)
