"""An adapter alone as a GGUF file, for llama.cpp's --lora beside a GGUF file of the base.

R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from tunesmith.configs.export import Export, GGUFFile
from tunesmith.errors import UserError, require
from tunesmith.export.gguf.architecture import find_architecture
from tunesmith.export.gguf.tensors import TOLERANCES, Placed, differences, place, read_file, write_tensors
from tunesmith.export.result import Check, Exported
from tunesmith.export.source import Source
from tunesmith.nn.head import Head
from tunesmith.nn.lora import LoRALayer, adapter_layers, is_adapters


def export_lora(source: Source, folder: Path, config: Export) -> Exported:
    """Write the adapter of `source` into one file in `folder`, and compare what the `gguf` package reads.

    Raises UserError for what llama.cpp's adapters have no place for: DoRA, an adapter on a tied output layer, quantized numbers.
    """
    gguf = require("gguf", "gguf", "`format: gguf`")
    settings = config.gguf or GGUFFile()
    architecture = find_architecture(source.family.name, source.config, not source.config.tie_word_embeddings)
    model = source.stream(config.device)
    layers = adapter_layers(model)
    _check(layers)
    alpha = next(iter(layers.values())).lora.alpha
    tensors = dict(_tensors(layers, alpha))
    base = {name: tuple(one.shape) for name, one in model.named_parameters() if not is_adapters(model, name)}
    wholes = {one.name: one for one in place(base, architecture, source.config)}
    placed = [half for name, layer in layers.items() for half in _halves(name, layer, wholes[f"{name}.weight"])]

    path = folder / f"{source.stem}-lora-{settings.type.upper()}.gguf"
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    made = [(one, partial(tensors.__getitem__, one.name)) for one in placed]
    write_tensors(writer, path, made, settings.type)
    return Exported(
        [
            Check(f"the gguf package ({kind})", "adapter's weights", difference, config.tolerance or TOLERANCES[kind])
            for kind, difference in differences(made, read_file(path)).items()
        ],
        ["llama.cpp applies it to a GGUF file of the base: export that, too"],
    )


def _check(layers: dict[str, LoRALayer]) -> None:
    for name, layer in layers.items():
        if layer.lora_magnitude is not None:
            raise UserError(
                "llama.cpp's adapters have no place for DoRA's magnitudes: leave `gguf.lora` out, and the adapter is merged"
            )
        if isinstance(layer, Head) and layer.tied_to is not None:
            raise UserError(
                f"the adapter is also on {name}, which is the embedding in llama.cpp: leave `gguf.lora` out, and the adapter is merged"
            )


def _tensors(layers: dict[str, LoRALayer], alpha: float) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of each half. llama.cpp multiplies B A by alpha / R, with one alpha for all: what is missing from a layer's own factor goes into B."""
    for name, layer in layers.items():
        rank = layer.lora.rank
        yield f"{name}.lora_A", layer.lora_A.detach().cpu().float()
        yield f"{name}.lora_B", layer.lora_B.detach().cpu().float() * (layer.lora.scaling * rank / alpha)


def _halves(name: str, layer: LoRALayer, whole: Placed) -> Iterator[Placed]:
    """Where both halves go. The rows of B are the layer's outputs, and ordered like them."""
    yield Placed(f"{name}.lora_A", f"{whole.gguf}.lora_a", tuple(layer.lora_A.shape))
    yield Placed(f"{name}.lora_B", f"{whole.gguf}.lora_b", tuple(layer.lora_B.shape), whole.heads)
