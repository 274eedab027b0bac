"""Folders of models and adapters: whether they hold what they must. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import UserError
from tunesmith.hub import fingerprint_folder, follow_latest, read_json, read_weight_map
from tunesmith.remote import is_remote

if TYPE_CHECKING:
    pass

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_FILE = "adapter_config.json"
_ADAPTER_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def model_problems(config: Any, notes: list[str]) -> Iterator[str]:
    name, from_scratch = config.model, bool(getattr(config, "from_scratch", False))
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from not_a_folder("model", name, notes, named_sizes=from_scratch)
    elif not folder.is_dir():
        yield f"`model`: {name} is a file; name the folder that holds it and its config.json"
    elif (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        adapters_may_stand_for_models = not hasattr(config, "weights")
        if not adapters_may_stand_for_models:
            yield f"`model`: {name} is a PEFT adapter; name its base as `model` and the adapter as `weights.adapter`"
        else:
            yield from _adapter("model", folder, getattr(config, "base", None), notes, config.takes_classifiers)
    else:
        yield from model_folder(folder, weights=not from_scratch, classifier=config.takes_classifiers)
        if getattr(config, "base", None) is not None:
            yield base_of_none(folder)


def base_of_none(folder: Path) -> str:
    """The sentence for a base that is given to a whole model."""
    return f"`base` is for adapters, but {folder} is no adapter (it has no {ADAPTER_FILE}): leave `base` out"


def not_a_folder(option: str, name: str, notes: list[str], named_sizes: bool = False) -> Iterator[str]:
    """A name that is no folder here: a named size, a Hub id, or a mistake."""
    from tunesmith.models.families import named_sizes as all_sizes

    if is_remote(name):
        if importlib.util.find_spec("fsspec") is None:
            yield f"`{option}`: {name} needs the package fsspec, which is not installed: pip install 'tunesmith[remote]'"
        notes.append(f"{name} is fetched when the run starts")
        return
    sizes = all_sizes() if name.count("/") == 1 else {}
    if name in sizes:
        if not named_sizes:
            yield f"`{option}`: {name} is a named size, for training from scratch; its trained weights are {sizes[name][2]}"
    elif HUB_ID.fullmatch(name) and not name.startswith((".", "~")):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON") and not _is_cached(name):
            yield f"`{option}`: there is no folder {name}, and HF_HUB_OFFLINE is set while the Hub cache has no such model"
        else:
            notes.append(f"{name} is taken for a Hub id, which is looked up when the run starts")
    else:
        yield f"`{option}`: there is no folder {name}, and a Hub id has the form owner/name"


def _is_cached(repo: str) -> bool:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return any((cache / f"models--{repo.replace('/', '--')}" / "snapshots").glob("*/*"))


def weights_folder(name: str, base: str | None = None) -> Path | None:
    """The folder with the config.json of a model, of an adapter its base's; None where it isn't here."""
    folder = follow_latest(Path(name).expanduser())
    if (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        named = base or read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
        folder = follow_latest(Path(str(named)).expanduser())
    return folder if (folder / "config.json").is_file() else None


def model_folder(folder: Path, weights: bool, classifier: bool = False) -> Iterator[str]:
    from tunesmith.models.families import check_speaks, model_config

    if not (folder / "config.json").is_file():
        if (folder / ".metadata").is_file():
            return  # a distributed checkpoint, which tells its numbers when it is read
        if (folder / "original" / "params.json").is_file():
            yield f"{folder}: no config.json; Meta's weights are in {folder / 'original'}: name that folder"
        elif not (folder / "params.json").is_file():
            run = folder / "checkpoints" / "latest"
            yield f"{folder}: no config.json, so this is no model folder" + (
                f"; the run's model is {run}" if run.exists() else ""
            )
        return
    try:
        hf_config, family, _ = model_config(folder)
        if not classifier:
            check_speaks(family, hf_config, str(folder))
    except UserError as error:
        yield str(error)
    if weights:
        yield from _weights(folder)


def _weights(folder: Path) -> Iterator[str]:
    """Missing shards and damaged files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_weight_map(index).values()))
        except UserError as error:
            yield str(error)
            return
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            yield f"{folder}: {len(missing)} of {len(shards)} weight files are missing ({named}); download the model again"
        files = [folder / shard for shard in shards if shard not in missing]
    else:
        files = [file for file in [folder / "model.safetensors"] if file.is_file()]
        if not files and any(folder.glob("*.safetensors")):
            yield f"{folder}: neither model.safetensors nor model.safetensors.index.json, which names the files of weights; download the model again"
        elif not files and not _has_other_weights(folder):
            yield f"{folder}: no *.safetensors: no weights"
    for file in files:
        if damage := damaged(file):
            yield f"{file}: {damage}" + ("" if "git lfs" in damage else "; download it again")


def _has_other_weights(folder: Path) -> bool:
    """Whether there are PyTorch files, of which tensors alone are read: Hugging Face's older ones, Meta's, or a distributed checkpoint's."""
    patterns = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        ".metadata",
        "consolidated.*.pth",
        "original/consolidated.*.pth",
    )
    return any(any(folder.glob(pattern)) for pattern in patterns)


def damaged(file: Path) -> str | None:
    """What is wrong with a safetensors file, told from its header and size; None if nothing is."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if head == b"version ":
            return "a Git LFS pointer, not the weights themselves; run `git lfs pull`"
        if len(head) < 8 or not 2 <= length <= 100_000_000:
            return "not a safetensors file" if size else "empty"
        if 8 + length > size:
            return f"cut off: {size:,} bytes, and its header alone needs {8 + length:,}"
        try:
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "damaged header"
    if size != 8 + length + end:
        return f"{'cut off' if size < 8 + length + end else 'too long'}: {size:,} bytes instead of {8 + length + end:,}"
    return None


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """{name: shape} of a whole safetensors file, told from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def adapter_problems(config: Any, notes: list[str]) -> Iterator[str]:
    for option, name in (
        ("adapter", getattr(config, "adapter", None)),
        ("weights.adapter", option_of(config, "weights", "adapter")),
    ):
        if name is None:
            continue
        folder = follow_latest(Path(name).expanduser())
        if not folder.exists():
            yield from not_a_folder(option, name, notes)
        elif not (folder / ADAPTER_FILE).is_file():
            yield f"`{option}`: {name} holds no {ADAPTER_FILE}, so it is no PEFT adapter"
        else:
            yield from _adapter(option, folder, config.model, notes, config.takes_classifiers)


def _adapter(option: str, folder: Path, base: str | None, notes: list[str], classifier: bool) -> Iterator[str]:
    """An adapter's own files, and its base where nothing else names one."""
    from tunesmith.models.config_json import check_known

    try:
        settings = read_json(folder / ADAPTER_FILE)
        check_known(settings, str(folder / ADAPTER_FILE))
    except UserError as error:
        yield str(error)
        return
    if settings.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and not classifier:
        yield f"`{option}`: {folder} is the adapter of a reward model or classifier, whose head gives scores instead of words: name a language model's"
    named = settings.get("base_model_name_or_path")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        if not (folder / "adapter_model.bin").is_file():
            yield f"{folder}: no adapter_model.safetensors, so this adapter has no weights"
    elif damage := damaged(weights):
        yield f"{weights}: {damage}"
    elif used := base or named:
        yield from _adapter_fit(folder, weights, follow_latest(Path(used).expanduser()))
    if base is None and not named:
        yield f"{folder / ADAPTER_FILE}: names no base model; give it as `base`"
    elif base is None and not Path(named or "").expanduser().exists():
        yield from not_a_folder(f"{option} (base of {folder})", named or "", notes)
    elif base is not None and not follow_latest(Path(base).expanduser()).exists():
        yield from not_a_folder("base", base, notes)
    elif base is not None and (warning := warn_of_another_base(folder, base)):
        notes.append(warning)


def warn_of_another_base(adapter: Path, base: str) -> str | None:
    """A sentence where an adapter names another base than the one it is put on: of the same shape, it loads and talks nonsense."""
    named = read_json(adapter / ADAPTER_FILE).get("base_model_name_or_path")
    if not named or _same_model(str(named), base):
        return None
    return f"the adapter in {adapter} was made for {named}, and is put on {base}: where these are different models, give the one it was made for"


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: the same folder, another with the same content, or, where one is not here, the same last name."""
    folders = [follow_latest(Path(name).expanduser()) for name in (one, other)]
    if all(folder.is_dir() for folder in folders):
        return folders[0].samefile(folders[1]) or len({fingerprint_folder(folder) for folder in folders}) == 1
    return len({_last_name(name) for name in (one, other)}) == 1


def _last_name(name: str) -> str:
    """Qwen3-0.6B of Qwen/Qwen3-0.6B, of /models/Qwen3-0.6B/ and of its place in the Hub's cache, …/models--Qwen--Qwen3-0.6B/snapshots/…"""
    cached = re.search(r"models--.+?--([^/]+)/snapshots/", name)
    return (cached[1] if cached else Path(name).name).lower()


def _adapter_fit(folder: Path, weights: Path, base: Path) -> Iterator[str]:
    """The first layer of an adapter that its base, where that is a folder here, lacks or has in another shape."""
    from tunesmith.models.families import model_config

    try:
        _, family, shape = model_config(base)
    except UserError:
        return  # told where the base is named, or looked up when the run starts
    names, _ = family.adaptable_layers(shape.num_hidden_layers)
    base_shapes: dict[str, list[int]] = {}
    for file in base.glob("*.safetensors"):
        if damaged(file) is None:
            base_shapes |= _tensor_shapes(file)
    for name, found in _tensor_shapes(weights).items():
        if (match := _ADAPTER_TENSOR.fullmatch(name)) is None:
            continue
        layer, side = match.groups()
        ours, dim = base_shapes.get(f"{layer}.weight"), "BA".index(side)  # A is (rank, inputs), B (outputs, rank)
        if layer not in names:
            what = f"it has weights for {layer}, and the model no such linear layer"
        elif ours and found[dim] != ours[dim] and f"{layer}.weight.absmax" not in base_shapes:  # two of NF4's a byte
            what = f"its {name} has the shape {tuple(found)}, and the model's {layer} {tuple(ours)}"
        else:
            continue
        yield f"the adapter in {folder} doesn't fit {base}: {what}"
        return


def option_of(config: Any, section: str, option: str) -> Any:
    return getattr(getattr(config, section, None), option, None)
