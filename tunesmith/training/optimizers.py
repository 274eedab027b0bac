"""Optimizers by name: from a section of the config to the class and its parameter groups."""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tunesmith.configs import optimizers as sections
from tunesmith.errors import UserError, require
from tunesmith.parallel.whole import Wholes
from tunesmith.training.adamw import AdamWithStateDtype
from tunesmith.training.muon import Muon

Parameters = list[tuple[str, nn.Parameter]]
_STATE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_optimizers(
    parameters: Parameters, config: sections.Optimizer, wholes: Callable[[], Wholes]
) -> list[torch.optim.Optimizer]:
    """The optimizer that `config` names, over `parameters` (name, parameter); two for Muon, whose vectors AdamW takes; none for none."""
    if not parameters and not isinstance(config, sections.Muon):  # it brings ranks together, also those without a part
        return []
    if isinstance(config, sections.AdamW):
        kind = torch.optim.AdamW
        if config.state_dtype is not None:
            kind = partial(AdamWithStateDtype, state_dtype=_STATE_DTYPES[config.state_dtype])
        groups = _groups(parameters, config.weight_decay)
        return [kind(groups, config.lr, config.betas, config.eps, fused=config.fused)]
    if isinstance(config, sections.AdamW8bit):
        torchao_optim = _import_torchao()
        return [torchao_optim.AdamW8bit(_groups(parameters, config.weight_decay), config.lr, config.betas, config.eps)]
    if isinstance(config, sections.SGD):
        groups = _groups(parameters, config.weight_decay)
        return [torch.optim.SGD(groups, config.lr, momentum=config.momentum, fused=True)]
    if isinstance(config, sections.Adafactor):
        return [torch.optim.Adafactor(_groups(parameters, config.weight_decay), config.lr)]
    if isinstance(config, sections.Muon):
        return _muon(parameters, config, wholes())
    return [_third_party(parameters, config)]


def _groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (norms, biases) are not."""
    matrices = [p for _, p in parameters if p.ndim >= 2]
    vectors = [p for _, p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _muon(parameters: Parameters, config: sections.Muon, wholes: Wholes) -> list[torch.optim.Optimizer]:
    def is_hidden_matrix(item: tuple[str, nn.Parameter]) -> bool:
        name, parameter = item
        return parameter.ndim == 2 and "embed_tokens" not in name and not name.startswith(("lm_head", "score"))

    matrices = [item for item in parameters if is_hidden_matrix(item)]
    others = [item for item in parameters if not is_hidden_matrix(item)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        settings = (config.lr, config.weight_decay, config.momentum, config.nesterov)
        optimizers.append(Muon(dict(matrices), wholes, *settings))
    if others:
        optimizers.append(torch.optim.AdamW(_groups(others, config.weight_decay), config.lr, fused=True))
    return optimizers


def _import_torchao() -> Any:
    """torchao's optimizers, without what it and torch tell developers of: kernels it wasn't built with, names that are to change."""
    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash_for_caching")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return require("torchao.optim", "torchao", "`optimizer.type: adamw_8bit`")
    finally:
        logging.disable(before)


def _third_party(parameters: Parameters, config: sections.ThirdPartyOptimizer) -> torch.optim.Optimizer:
    kind: Callable[..., torch.optim.Optimizer] = import_dotted(config.type, "optimizer.type")
    try:
        optimizer = kind([p for _, p in parameters], lr=config.lr, **config.options)
    except TypeError as error:
        raise UserError(f"`optimizer.type: {config.type}` doesn't take these options: {error}") from error
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"`optimizer.type: {config.type}` computes the loss several times a step (its step() needs a closure), which training doesn't do: choose another"
        )
    return optimizer


def import_dotted(path: str, key: str) -> Any:
    """The object at a dotted `path`; UserError naming the config `key` where it can't be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"`{key}: {path}` can't be imported: {error}") from error
