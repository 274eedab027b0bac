"""Which families there are, and which one a model folder belongs to. Imports no torch."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.errors import UserError
from tunesmith.models.config_json import checked
from tunesmith.models.family import DecoderConfig, Family

FAMILIES = {
    "llama": "tunesmith.models.llama.family",
    "mistral": "tunesmith.models.mistral.family",
    "qwen2": "tunesmith.models.qwen2.family",
    "qwen3": "tunesmith.models.qwen3.family",
    "gemma": "tunesmith.models.gemma.family",
    "gemma2": "tunesmith.models.gemma2.family",
    "gemma3": "tunesmith.models.gemma3.family",
    "phi3": "tunesmith.models.phi3.family",
    "olmo2": "tunesmith.models.olmo2.family",
}
"""Name -> the module that holds its record, FAMILY."""


@cache
def all_families() -> tuple[Family, ...]:
    return tuple(importlib.import_module(module).FAMILY for module in FAMILIES.values())


def find_family(hf: dict[str, Any], where: str) -> Family:
    """The family that serves a config.json's content; `where` names the file in errors.

    Raises UserError for an architecture that no family serves, naming those that one does.
    """
    for key in ("architectures", "model_type"):
        if hf.get(key) is not None:
            checked(key, hf[key], where)
    wanted = hf.get("architectures") or []
    for family in all_families():
        names = {*family.architectures, family.classifier(per_token=False), family.classifier(per_token=True)}
        if set(wanted) & names:
            return family
        if not wanted and hf.get("model_type") in family.model_types:
            return family
    if not wanted and not hf.get("model_type"):
        raise UserError(
            f"{where} names neither `architectures` nor a `model_type`: is it a language model's config.json?"
        )
    raise UserError(_unknown(wanted[0] if wanted else hf["model_type"], where, bool(wanted)))


def check_speaks(family: Family, hf: dict[str, Any], where: str) -> None:
    """Raise UserError for a reward model or classifier, where a language model is wanted."""
    if family.scores(hf) is not None:
        raise UserError(
            f"{where} is a reward model or classifier ({', '.join(hf['architectures'])}), whose head gives scores instead of words: "
            "name a language model"
        )


def model_config(folder: str | Path) -> tuple[dict[str, Any], Family, DecoderConfig]:
    """The text model that a folder's config.json describes: its content, family and shape.

    Raises UserError where the file is missing, corrupt, or describes something we don't know.
    """
    from tunesmith.hub import read_json

    path = Path(folder) / "config.json"
    hf = read_json(path)
    family = find_family(hf, str(path))
    try:
        hf = family.text_config(hf)
        return hf, family, family.read_config(hf)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


@cache
def named_sizes() -> dict[str, tuple[Family, dict[str, Any], str]]:
    """Name, such as "llama3_2/1B" -> its family, the content of its config.json, the Hub repository it stands for."""
    return {
        name: (family, hf, family.repositories[name]) for family in all_families() for name, hf in family.sizes.items()
    }


def _unknown(name: str, where: str, is_architecture: bool) -> str:
    families = all_families()
    known = sorted({one for f in families for one in (f.architectures if is_architecture else f.model_types)})
    # A program wrote this name: only another spelling of a known one is a slip; what merely looks like it is another model.
    same = [one for one in known if one.lower() == name.lower()]
    hint = f", did you mean {same[0]}?" if same else ""
    return f"{where}: the architecture {name} is not among those known{hint} ({', '.join(known)})"
