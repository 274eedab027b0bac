"""What is exported: a model, or an adapter and its base, known by its configuration before weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import hub
from tunesmith.checkpoint.adapter import adapted_config, check_changes_something
from tunesmith.checkpoint.adapter_config import read_adapter_config
from tunesmith.checkpoint.load import read_model_config
from tunesmith.errors import UserError
from tunesmith.models.decoder import CausalLM
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.nn.lora import adapter_layers
from tunesmith.training.load import stream_model
from tunesmith.training.preflight import base_of_none


@dataclass(frozen=True)
class Source:
    """A model to be exported."""

    name: str
    """As the user called it."""
    folder: Path
    """Of the model, or of the adapter."""
    base: Path | None
    """Of the base, where `folder` holds an adapter."""
    hf_config: dict[str, Any]
    family: Family
    config: DecoderConfig

    @property
    def weights(self) -> Path:
        """The folder of the model itself."""
        return self.base or self.folder

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer's files are: an adapter's own, saved with it, are preferred to its base's."""
        return hub.tokenizer_home(self.folder, self.weights)

    @property
    def stem(self) -> str:
        """What to call a file of it: the last part of its name; of checkpoints/latest the checkpoint's."""
        is_here = Path(self.name).expanduser().exists()
        return re.sub(r"[^\w.-]+", "-", self.folder.resolve().name if is_here else self.name.rpartition("/")[2])

    def stream(self, device: str) -> CausalLM:
        """The model, adapter included, its weights still in their files. Raises UserError for an adapter that changes nothing."""
        # A QLoRA adapter, too, is merged into the base as it was before quantization.
        model = stream_model(self.folder, device, base=self.base)
        if self.base is not None:
            check_changes_something(model)
            print(f"{len(adapter_layers(model))} adapter layers of {self.folder} on {self.base}")
        return model


def find_source(name: str, base: str | None) -> Source:
    """The source called `name`, a folder or Hub id of a model or adapter. Raises UserError where it is none, or doesn't fit `base`."""
    folder = hub.resolve(name)
    base_folder = find_base(folder, base)
    hf_config, family, config = read_model_config(base_folder or folder)
    if base_folder is not None:
        hf_config = adapted_config(folder, family, hf_config)
    return Source(name, folder, base_folder, hf_config, family, config)


def find_base(folder: Path, base: str | None) -> Path | None:
    """The folder of the base where `folder` holds an adapter; None where it holds a model."""
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        if base is not None:
            raise UserError(base_of_none(folder))
        return None
    named = base or read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise UserError(f"the adapter in {folder} doesn't name its base: set `base`")
    return hub.resolve(named)
