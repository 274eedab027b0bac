"""Weights quantized so that a model's layers still do what they did on given text, one layer after another.

B samples, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.nn.gptq import Hessian, gptq
from tunesmith.nn.lora import replace_module
from tunesmith.nn.rounding import merged_linear, quantizable_layers, quantize_layer
from tunesmith.nn.scheme import Scheme

_TOKENS_AT_ONCE = 4096


def calibration_samples(tokenizer: Tokenizer, texts: Iterable[str], num_samples: int, length: int, seed: int) -> Tensor:
    """Ids (B, T): pieces of the texts, which stand one behind the other, drawn without overlap.

    Raises UserError where the texts have too few tokens.
    """
    ids = [token for text in texts for token in tokenizer.encode(text)]
    pieces = len(ids) // length
    if pieces < num_samples:
        raise UserError(
            f"`calibration.data` has {len(ids)} tokens, and {num_samples} samples of {length} need {num_samples * length}: give more "
            f"text, or take `calibration.num_samples={pieces}`"
            if pieces
            else f"`calibration.data` has {len(ids)} tokens, fewer than one sample of {length}: give more text"
        )
    chosen = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))[:num_samples].sort().values
    return torch.tensor(ids[: pieces * length]).view(pieces, length)[chosen]


@torch.no_grad()
def calibrate(model: CausalLM, samples: Tensor, scheme: Scheme) -> dict[str, tuple[Tensor, Tensor]]:
    """{linear layer: levels and scales of its weight, adapter merged, on the host} by GPTQ; the model is left as it was.

    A layer of the model is given what the layers before it, quantized, make of the samples (B, T). In memory are the hidden states of
    all samples once, one layer's Hessians, and the levels found so far.
    """
    decoder, device = model.model, model.model.device
    batches = samples.split(max(1, _TOKENS_AT_ONCE // samples.shape[1]))
    hidden = [decoder.embed(ids.to(device)).cpu() for ids in batches]
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with _kept(model, quantizable_layers(model, scheme)) as layers:
        for number, block in decoder.layers.named_children():
            inside = {name: layer for name, layer in layers.items() if name.startswith(f"model.layers.{number}.")}
            with _watched(inside) as hessians:
                for _ in _through(model, block, batches, hidden):
                    pass
            for name, layer in inside.items():
                plain = merged_linear(layer)
                quantized = gptq(plain.weight, hessians.pop(name).sum, scheme)
                replace_module(model, name, quantize_layer(plain, scheme, quantized))
                found[name] = (quantized[0].cpu(), quantized[1].cpu())
            hidden = list(_through(model, block, batches, hidden))
    return found


def _through(
    model: CausalLM, block: nn.Module, batches: Sequence[Tensor], hidden: Sequence[Tensor]
) -> Iterator[Tensor]:
    """The hidden states (B, T, D) of all batches behind one layer."""
    device = model.model.device
    for ids, x in zip(batches, hidden):
        yield block(x.to(device), model.sight(ids.to(device), None, None, None)).cpu()


@contextmanager
def _watched(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Hessian]]:
    """Within it what the layers are given is summed up."""
    sums = {name: Hessian(layer.in_features, layer.weight.device) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(partial(_add, sums[name])) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _add(hessian: Hessian, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    hessian.add(inputs[0])


@contextmanager
def _kept(model: CausalLM, names: Iterable[str]) -> Iterator[dict[str, nn.Linear]]:
    """The linear layers of these names, which stand in their place again afterwards."""
    layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}  # type: ignore[misc]
    try:
        yield layers
    finally:
        for name, layer in layers.items():
            replace_module(model, name, layer)
