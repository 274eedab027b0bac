"""Where a model comes from: a folder, a Hub id, an adapter that names its base, or a named size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import hub
from tunesmith.checkpoint.adapter_config import read_adapter_config
from tunesmith.checkpoint.hf import read_model_config
from tunesmith.errors import UserError
from tunesmith.models import families
from tunesmith.models.family import DecoderConfig, Family
from tunesmith.training.preflight import labels_of


@dataclass
class Source:
    """Where a model comes from: a folder with weights, or only the numbers of a named size."""

    folder: Path | None
    hf_config: dict[str, Any]
    family: Family
    name: str
    repository: str | None = None
    """Hub id that a named size stands for."""
    new_head: str | None = None
    """What the names of the output layer's parameters begin with, where the folder has another one or none: it is initialised."""

    @property
    def label_names(self) -> list[str]:
        """What its head scores; empty for a language model."""
        return self.family.label_names(self.hf_config)

    @property
    def tokenizer(self) -> Path | str:
        """Where its tokenizer is: the folder, or for a named size the repository."""
        return self.folder or self.repository or self.name

    @property
    def fingerprint(self) -> str:
        """Changes with its weights and numbers."""
        numbers = hashlib.sha256(json.dumps(self.hf_config, sort_keys=True).encode()).hexdigest()[:16]
        return f"{hub.fingerprint_folder(self.folder)}-{numbers}" if self.folder else numbers


def find_model(
    name: str, model_args: dict[str, Any] | None = None, need_weights: bool = True, classifier: bool = False
) -> Source:
    """The source of the model called `name`: a folder, a Hub id, or (without weights) a named size such as llama3_2/1B.

    classifier: whether reward models and classifiers are welcome, too. Raises UserError for one where they are not.
    """
    sizes = families.named_sizes()
    if not need_weights and name in sizes and not Path(name).is_dir():
        family, hf_config, repository = sizes[name]
        return Source(None, {**hf_config, **(model_args or {})}, family, name, repository)
    ignored = None if need_weights else ["*.safetensors", "*.bin", "*.pth", "*.gguf"]
    folder = hub.resolve(name, ignore_patterns=ignored)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is an adapter, not a model: give its base as `model` and the adapter as `weights.adapter`"
        )
    hf_config, family, _ = read_model_config(folder)
    if not classifier:
        families.check_speaks(family, hf_config, name)
    return Source(folder, {**hf_config, **(model_args or {})}, family, name)


_PROBLEMS = {"preference": "regression", "classification": "single_label_classification"}
"""What transformers calls the task of a classifier of texts."""


def as_classifier(source: Source, task: str, labels: Sequence[str] | None, pad_id: int) -> Source:
    """The same model with a head for a task of `tune run reward`: its own, where it has such a one, or a new one.

    labels: names of what is scored, None: those it has. pad_id: what stands behind the last token of a text. Raises UserError
    as `preflight.labels_of`.
    """
    family, hf, more = source.family, source.hf_config, dict[str, Any](pad_token_id=pad_id)
    names = labels_of(source.name, family, hf, task, labels)
    if task in _PROBLEMS:
        more["problem_type"] = _PROBLEMS[task]
    described = family.classifier_config(hf, names, per_token=task == "process") | more
    return replace(source, hf_config=described, new_head="score." if family.scores(hf) is None else None)


def describe_model(path: str) -> tuple[Family, DecoderConfig]:
    """Family and shape of a model, or of the base of an adapter, before its weights are read."""
    folder = hub.resolve(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        folder = base_of(folder, None)
    _, family, shape = read_model_config(folder)
    return family, shape


def base_of(adapter: Path, base: str | Path | None) -> Path:
    """The folder of the base of the adapter in a folder: `base`, or the one it names."""
    name = str(base) if base is not None else read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter} doesn't name its base model: give it")
    return hub.resolve(name)


def tokenizer_folder(model: str, adapter: str | None = None) -> Path:
    """Where the tokenizer of a model, or of one with an adapter, is: an adapter made here brings its own, others use their base's."""
    folder = hub.resolve(model)
    own = hub.resolve(adapter, what="adapter") if adapter else folder
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    base = base_of(folder, None) if is_adapter else folder
    return hub.tokenizer_home(own, hub.tokenizer_home(folder, base))
