"""What can be checked before weights are loaded: model and adapter files, data, templates, packages, folders. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.configs.export import Export
from tunesmith.configs.generate import Generate
from tunesmith.configs.layout import Layout, rows_problem
from tunesmith.configs.shared import TOO_EARLY
from tunesmith.configs.stages import micro_batch_problems, stage_layers
from tunesmith.errors import ConfigError, UserError
from tunesmith.hub import fingerprint_folder, follow_latest, read_json, read_weight_map
from tunesmith.nn.scheme import INTEGER_TYPES
from tunesmith.remote import is_remote, missing_package, working_folder
from tunesmith.training.vocabulary import read_vocabulary, vocabulary_problem

if TYPE_CHECKING:
    from tunesmith.models.family import DecoderConfig, Family

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_FILE = "adapter_config.json"
_ADAPTER_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check(config: Any, processes: int | None = None, folder_is_checked_later: bool = False) -> list[str]:
    """Check a loaded config against the machine and its files; returns what could not be checked yet.

    processes: how many the run will have; 0 where that is not known yet, None for as many as were started.
    folder_is_checked_later: leave `output_dir` to the run itself: other nodes may write into it already. Raises ConfigError with one line per finding.
    """
    notes: list[str] = []
    parts = [part for part in _PARTS if not (folder_is_checked_later and part is _output)]
    findings = [finding for part in parts for finding in part(config, notes)]
    findings += _processes(config, processes)
    if findings:
        raise ConfigError("\n".join(dict.fromkeys(findings)))
    return notes


# --- models --------------------------------------------------------------------------------------


def _model(config: Any, notes: list[str]) -> Iterator[str]:
    name, from_scratch = config.model, bool(getattr(config, "from_scratch", False))
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from _not_a_folder("model", name, notes, named_sizes=from_scratch)
    elif not folder.is_dir():
        yield f"`model`: {name} is a file; name the folder that holds it and its config.json"
    elif (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        adapters_may_stand_for_models = not hasattr(config, "weights")
        if not adapters_may_stand_for_models:
            yield f"`model`: {name} is a PEFT adapter; name its base as `model` and the adapter as `weights.adapter`"
        else:
            yield from _adapter("model", folder, getattr(config, "base", None), notes, config.takes_classifiers)
    else:
        yield from _model_folder(folder, weights=not from_scratch, classifier=config.takes_classifiers)


def _not_a_folder(option: str, name: str, notes: list[str], named_sizes: bool = False) -> Iterator[str]:
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


def _model_folder(folder: Path, weights: bool, classifier: bool = False) -> Iterator[str]:
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


def _teacher(config: Any, notes: list[str]) -> Iterator[str]:
    """The model that another learns from: its files, whether the layout can cut it, and whether both have the same tokens."""
    from tunesmith.models.families import model_config

    if (name := _get(config, "teacher", "model")) is None:
        return
    folder = follow_latest(Path(name).expanduser())
    if not folder.is_dir():
        yield from (
            [f"`teacher.model`: {name} is a file"] if folder.exists() else _not_a_folder("teacher.model", name, notes)
        )
        return
    if (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        yield f"`teacher.model`: {name} is a PEFT adapter; merge it into its base with `tune run export` first"
        return
    yield from (problems := list(_model_folder(folder, weights=True)))
    if problems or not (folder / "config.json").is_file():
        return
    hf_config, _, shape = model_config(folder)
    try:
        check_plain(hf_config, name)
    except UserError as error:
        yield str(error)
        return
    yield from frozen_layout_problems("teacher.model", config, shape, bool(config.teacher.quantize))
    try:
        student = _shape(config)
    except UserError:
        return  # told where the student is
    if student is not None:
        yield from _other_tokens(config, student[1].vocab_size, "teacher.model", folder, shape.vocab_size)


def _other_tokens(config: Any, rows: int, option: str, folder: Path, teacher_rows: int) -> Iterator[str]:
    """One sentence where the model of `option`, in `folder`, has other tokens than the trained one."""
    file = follow_latest(Path(config.tokenizer.path or config.model).expanduser())
    file, teacher_file = (one / "tokenizer.json" if one.is_dir() else one for one in (file, folder))
    if rows <= teacher_rows and file.is_file() and teacher_file.is_file():
        if file.read_bytes() == teacher_file.read_bytes():
            return
    student = read_vocabulary(config.model, rows, file)
    teacher = read_vocabulary(str(folder), teacher_rows, teacher_file)
    if student.tokens is None or teacher.tokens is None:
        return  # of other files the run's own reader makes the tokens
    if problem := vocabulary_problem(student, teacher, config.tokenizer.add_tokens):
        yield f"`{option}`: {problem}"


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


def _adapters(config: Any, notes: list[str]) -> Iterator[str]:
    for option, name in (
        ("adapter", getattr(config, "adapter", None)),
        ("weights.adapter", _get(config, "weights", "adapter")),
    ):
        if name is None:
            continue
        folder = follow_latest(Path(name).expanduser())
        if not folder.exists():
            yield from _not_a_folder(option, name, notes)
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
        yield from _not_a_folder(f"{option} (base of {folder})", named or "", notes)
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
        elif ours and found[dim] != ours[dim]:
            what = f"its {name} has the shape {tuple(found)}, and the model's {layer} {tuple(ours)}"
        else:
            continue
        yield f"the adapter in {folder} doesn't fit {base}: {what}"
        return


# --- how model, tokenizer and settings go together -----------------------------------------------


def _fit(config: Any, notes: list[str]) -> Iterator[str]:
    """What the numbers in config.json decide for a run that trains."""
    if not hasattr(config, "weights"):
        return
    from tunesmith.nn.targets import choose_layers

    try:
        if (found := _shape(config)) is None:
            return
        family, shape = found
        check_trainable(_config_json(config), config.model)
        yield from layout_problems(config, shape)
        yield from group_problems(config, family, shape)
        if config.weights.type == "lora" and config.weights.adapter is None:
            choose_layers(*family.adaptable_layers(shape.num_hidden_layers), config.weights.target_modules)
        check_vocabulary(config, config.model, shape.vocab_size, _count_tokens(config, shape.vocab_size))
    except UserError as error:
        yield str(error)
        return
    unloadable = warn_of_unloadable(family, per_token=getattr(config, "task", None) == "process")
    notes += filter(None, (warn_of_length(config, shape), unloadable))


def _labels(config: Any, notes: list[str]) -> Iterator[str]:
    """What a model is to score, and whether it can."""
    from tunesmith.models.families import model_config

    folder = follow_latest(Path(config.model).expanduser())
    if hasattr(config, "labels") and (folder / "config.json").is_file():
        try:
            hf_config, family, _ = model_config(folder)
            labels_of(config.model, family, hf_config, config.task, config.labels)
        except UserError as error:
            yield str(error)


def labels_of(
    model: str, family: Family, hf_config: dict[str, Any], task: str, labels: Sequence[str] | None
) -> Sequence[str]:
    """Names of what `model` scores in a task of `tune run reward`: `labels`, where it doesn't have its own.

    Raises UserError for a model that scores something else, or where neither it nor the config says what the classes are.
    """
    own, per_token, named = family.scores(hf_config), task == "process", family.label_names(hf_config)
    if own is None and not labels:
        raise UserError(
            f"{model} gets a new head: say how many classes there are, by `dataset.label_names` or `num_labels`"
        )
    wanted = labels or named
    if own is not None and (own.per_token, own.num_labels) != (per_token, len(wanted)):
        scored = {True: "every token", False: "texts"}
        raise UserError(
            f"{model} scores {scored[own.per_token]} with {own.num_labels} label{'s' * (own.num_labels > 1)}, and `task: {task}` "
            f"{scored[per_token]} with {len(wanted)}: name a language model, which gets a new head, or another task"
        )
    return wanted if own is None or task == "classification" else named


def _reference(config: Any, notes: list[str]) -> Iterator[str]:
    """The model that a preference method compares with, where another one is named."""
    from tunesmith.models.families import model_config

    name = _get(config, "reference", "model")
    if name is None:
        return
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from _not_a_folder("reference.model", name, notes)
        return
    problems = list(_model_folder(folder, weights=True))
    yield from (f"`reference.model`: {problem}" for problem in problems)
    try:
        if not problems and (ours := _shape(config)) is not None:
            hf_config, family, shape = model_config(folder)
            check_plain(hf_config, name)
            check_reference(config.model, ours, name, (family, shape))
            yield from _other_tokens(config, ours[1].vocab_size, "reference.model", folder, shape.vocab_size)
    except UserError as error:
        yield str(error)


def check_reference(
    model: str, ours: tuple[Family, DecoderConfig], name: str, other: tuple[Family, DecoderConfig]
) -> None:
    """Raise UserError where the reference `name` is not a model of the shape and vocabulary of the one that is trained."""
    (family, shape), (their_family, theirs) = ours, other
    pairs = {"family": (family.name, their_family.name)}
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    pairs |= {size: (getattr(shape, size), getattr(theirs, size)) for size in sizes}
    if different := [f"its {size} is {their} instead of {own}" for size, (own, their) in pairs.items() if own != their]:
        raise UserError(
            f"`reference.model`: {name} is another kind of model than {model}: {', '.join(different)}; a reference is the trained model "
            "at an earlier time, such as the one that training starts from"
        )


def layout_problems(config: Any, shape: DecoderConfig) -> Iterator[str]:
    """One sentence for everything of the model's `shape` that the layout of a run that trains can't cut."""
    yield from Layout.of(config).problems(shape, quantized=bool(_get(config, "weights", "quantize_base")))
    if config.pipeline_parallel_dim > 1:
        try:
            stage_layers(config, shape.num_hidden_layers)
        except UserError as error:
            yield str(error)
        has_own_head = hasattr(config, "task")  # one that scores
        if shape.tie_word_embeddings and not has_own_head and config.optimizer.type == "adamw_8bit":
            yield (
                "`optimizer.type: adamw_8bit` can't be combined with `pipeline_parallel_dim` where the model's head is tied to its "
                "embedding: each rank keeps such states for itself, and one of the two could not be resumed; use adamw"
            )


def group_problems(config: Any, family: Family, shape: DecoderConfig) -> Iterator[str]:
    """One sentence for the linear layers whose inputs `qat` can't cut into groups, or tensor parallelism would cut inside a group."""
    qat = config.qat
    if qat is None:
        return
    if qat.type not in INTEGER_TYPES:
        yield (
            f"`qat.type: {qat.type}` needs a device that multiplies 8-bit floating-point numbers, to convert and check the model on, and "
            f"none is supported yet: take {' or '.join(INTEGER_TYPES)}"
        )
        return
    layers = family.linear_inputs(shape)
    uneven = [name for name, (inputs, _) in layers.items() if inputs % qat.group_size]
    if uneven and (not qat.skip_indivisible or len(uneven) == len(layers)):
        named = ", ".join(f"{name} ({layers[name][0]})" for name in uneven)
        fitting = math.gcd(*(inputs for inputs, _ in layers.values()))
        cure = f"take {_largest_divisor(fitting, qat.group_size)}, or another divisor of {fitting}"
        if len(uneven) < len(layers):
            cure += "; or leave such layers as they are with `qat.skip_indivisible: true`"
        yield f"`qat.group_size` = {qat.group_size} does not divide the inputs of {named}: {cure}"
        return
    tp = config.tensor_parallel_dim
    for name, (inputs, is_cut) in layers.items():
        if is_cut and inputs % qat.group_size == 0 and inputs % tp == 0 and inputs // tp % qat.group_size:
            yield (
                f"`qat` keeps `group_size` = {qat.group_size} weights together, and `tensor_parallel_dim: {tp}` would cut the "
                f"{inputs} inputs of {name} into {inputs // tp} for each rank: take fewer ranks, or smaller groups"
            )


def _largest_divisor(number: int, most: int) -> int:
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def check_plain(hf_config: dict[str, Any], model: str) -> None:
    """Raise UserError where the weights of a reference or a teacher are quantized: they are spread over ranks like the trained ones."""
    if hf_config.get("quantization_config"):
        raise UserError(
            f"{model} is quantized: name the model it was made from, which `quantize: nf4` beside its name holds in 4 bits"
        )


def check_trainable(hf_config: dict[str, Any], model: str) -> None:
    """Raise UserError where the weights are quantized: what was rounded can't take small steps."""
    if hf_config.get("quantization_config"):
        raise UserError(f"{model} is quantized, and can't be trained: name the model it was made from")


def _config_json(config: Any) -> dict[str, Any]:
    file = follow_latest(Path(config.model).expanduser()) / "config.json"
    return read_json(file) if file.is_file() else {}


def frozen_layout_problems(option: str, config: Any, shape: DecoderConfig, quantized: bool) -> Iterator[str]:
    """The same for the model of `option`, which is spread like the trained one but stays as it is."""
    for problem in Layout.of(config).problems(shape, quantized):
        yield f"`{option}`: {problem.replace('`weights.quantize_base`', 'its quantization')}"
    if config.pipeline_parallel_dim > 1:
        try:
            stage_layers(frozen_stages(config), shape.num_hidden_layers)
        except UserError as error:
            yield f"`{option}`: {error}"


def frozen_stages(config: Any) -> Any:
    """The config for a model whose layers are cut evenly, since it may have another number of them than the trained one."""
    return replace(config, pipeline_parallel_layers_per_stage=None, pipeline_parallel_split_points=None)


def _shape(config: Any) -> tuple[Family, DecoderConfig] | None:
    """Family and numbers of the model, where they are here. Raises UserError for what is wrong with them."""
    from tunesmith.models.families import model_config, named_sizes

    folder, changes = follow_latest(Path(config.model).expanduser()), getattr(config, "model_args", None) or {}
    if (folder / "config.json").is_file():
        hf_config, family, shape = model_config(folder)
    elif config.model.count("/") == 1 and config.model in named_sizes():
        family, hf_config, _ = named_sizes()[config.model]
        shape = family.read_config(hf_config)
    else:
        return None
    return family, family.read_config({**hf_config, **changes}) if changes else shape


def _count_tokens(config: Any, rows: int) -> int:
    """How many tokens tokenizer.json and `tokenizer.add_tokens` make, where that may be more than `rows`; else 0.

    To parse a large file takes most of a second: first it is searched for a number that could be such an id.
    """
    place, added = Path(config.tokenizer.path or config.model).expanduser(), dict.fromkeys(config.tokenizer.add_tokens)
    file = follow_latest(place) / "tokenizer.json" if place.is_dir() or place.name == "latest" else place
    if file.suffix != ".json" or not file.is_file():
        return 0
    content, spare = file.read_bytes(), max(0, rows - len(added))
    if not any(int(number) >= spare for number in re.findall(rb":\s*(\d{%d,9})\b" % len(str(spare)), content)):
        return 0
    try:
        parsed = json.loads(content)
        ids = {**parsed["model"]["vocab"], **{token["content"]: token["id"] for token in parsed["added_tokens"]}}
        return max(ids.values()) + 1 + sum(token not in ids for token in added)
    except (ValueError, KeyError, TypeError):
        return 0  # another kind of tokenizer, or a damaged file: the run's own reader says which


def check_vocabulary(config: Any, model: str, rows: int, needed: int) -> None:
    """Raise UserError where a tokenizer of `needed` tokens goes beyond the model's embedding, and it was not asked, or able, to grow."""
    if needed <= rows:
        return
    if not config.tokenizer.add_tokens:
        raise UserError(
            f"the tokenizer has {needed} tokens and {model} an embedding of {rows} rows: they don't belong together; "
            "give the model's own tokenizer, or name new tokens in `tokenizer.add_tokens`"
        )
    if config.weights.type == "lora":
        raise UserError(
            "`tokenizer.add_tokens` grows the embedding, whose new rows an adapter doesn't hold: use `weights.type: full`"
        )


def warn_of_length(config: Any, shape: DecoderConfig) -> str | None:
    """A sentence where rows may be longer than the model is made for."""
    wanted, limit = config.tokenizer.max_seq_len, shape.context_length
    if wanted is None or wanted <= limit:
        return None
    return (
        f"`tokenizer.max_seq_len` = {wanted} is more than the {limit} tokens that {config.model} is made for "
        "(`max_position_embeddings`, stretched as its config.json says): it has never seen the positions behind them"
    )


def warn_of_unloadable(family: Family, per_token: bool) -> str | None:
    """A sentence where transformers will not load what a run saves."""
    name = family.classifier(per_token)
    if not per_token or name not in family.unloadable:
        return None
    return f"transformers has no {name}: what this run saves can be loaded by tunesmith alone"


def _tokenizer(config: Any, notes: list[str]) -> Iterator[str]:
    tokenizer = getattr(config, "tokenizer", None)
    if tokenizer is None:
        return
    if tokenizer.path is not None and not Path(tokenizer.path).expanduser().exists():
        yield from _not_a_folder("tokenizer.path", tokenizer.path, notes)
    template = tokenizer.chat_template
    built_in = Path(__file__).parents[1] / "data" / "templates"
    if (
        template is not None
        and "{{" not in template
        and "{%" not in template
        and not Path(template).expanduser().is_file()
    ):
        names = sorted(file.stem for file in built_in.glob("*.jinja"))
        if template not in names:
            yield f"`tokenizer.chat_template`: no file {template}, and no built-in template of that name ({', '.join(names)})"


# --- data ----------------------------------------------------------------------------------------


def _data(config: Any, notes: list[str]) -> Iterator[str]:
    for option in ("dataset", "dataset_val"):
        given = getattr(config, option, None)
        sources = given if isinstance(given, list) else [given] if given else []
        if isinstance(given, list) and not given:
            yield f"`{option}` is an empty list; name at least one source"
        for index, source in enumerate(sources):
            dotted = f"{option}.{index}" if isinstance(given, list) else option
            yield from _source(source, dotted, notes)
            if source.packed and config.tokenizer.max_seq_len is None:
                notes.append(
                    f"`{dotted}.packed` fills rows to the default length, as `tokenizer.max_seq_len` is not set"
                )


def _source(source: Any, option: str, notes: list[str]) -> Iterator[str]:
    from tunesmith.data import named

    name = source.source
    if source.reader is not None:
        file, is_file, _ = source.reader.rpartition(".py:")
        if is_file and not Path(f"{file}.py").expanduser().is_file():
            yield f"`{option}.reader`: there is no file {file}.py"
        elif not is_file and not _importable(source.reader):
            yield f"`{option}.reader`: no module {source.reader.rpartition('.')[0]} can be imported"
        return
    if name in named.NAMED or Path(name).expanduser().exists():
        try:
            named.resolve(source)
        except UserError as error:
            yield f"`{option}.source`: {error}"
        return
    if any(sign in name for sign in "*?["):
        base = Path(name).expanduser()
        if not any(base.parent.glob(base.name)) and "**" not in name:
            yield f"`{option}.source`: no file matches {name}"
    elif Path(name).suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt", ".tsv", ".gz") or name.startswith(
        (".", "/", "~")
    ):
        yield f"`{option}.source`: there is no file {name}"
    elif HUB_ID.fullmatch(name):
        if importlib.util.find_spec("datasets") is None:
            yield f"`{option}.source`: {name} is taken for a Hub id, which needs the package datasets: pip install 'tunesmith[datasets]'"
        notes.append(f"{name} is taken for a Hub id, which is looked up when the run starts")
    else:
        import difflib

        near = difflib.get_close_matches(name, named.NAMED, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else "; `tune ls` lists the built-in names"
        yield f"`{option}.source`: {name} is no file, folder or built-in data set{hint}"


# --- where and with what -------------------------------------------------------------------------


def is_restart() -> bool:
    """Whether torchrun started this process again, after one of the run's processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def _output(config: Any, notes: list[str]) -> Iterator[str]:
    folder = getattr(config, "output_dir", None)
    if folder is None:
        return
    if is_remote(folder):
        yield from _remote_output(config, folder, notes)
        return
    path = Path(folder).expanduser()
    resumes = getattr(config, "resume_from_checkpoint", False) or is_restart()
    if path.exists() and not path.is_dir():
        yield f"`output_dir`: {folder} is a file"
    elif path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()) and not resumes:
        cure = (
            ", or set `resume_from_checkpoint=true` to go on from its newest checkpoint"
            if hasattr(config, "epochs")
            else ""
        )
        yield f"`output_dir`: {folder} is not empty; choose another{cure}"
    else:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not os.access(existing, os.W_OK):
            yield f"`output_dir`: {folder} can't be written to"


def _remote_output(config: Any, url: str, notes: list[str]) -> Iterator[str]:
    if not hasattr(config, "epochs"):
        yield f"`output_dir`: {url} can't be written to directly; name a local or shared folder, and copy it there"
    elif problem := missing_package(url):
        yield f"`output_dir`: {problem}"
    else:
        notes.append(
            f"{url} is looked at when the run starts; the run works in {working_folder(url)}, and each checkpoint is copied there"
        )


def _processes(config: Any, processes: int | None) -> Iterator[str]:
    """What the number of processes decides, as far as it is known."""
    known = int(os.environ.get("WORLD_SIZE") or 0) if processes is None else processes
    if not hasattr(config, "tensor_parallel_dim"):
        if (known > 1 or processes == 0) and isinstance(config, (Generate, Export)):
            yield "`generate` and `export` run in one process: leave the launch options out"
        return
    if known:
        try:
            _, replicas, shards, *_ = Layout.of(config).sizes(known)
        except UserError as error:
            yield str(error)
            return
    elif processes is None:  # as many as the layout names, else one: the one that reads this
        replicas, shards = config.data_parallel_replicate_dim, max(1, config.data_parallel_shard_dim)
    else:
        return
    if config.data_parallel_shard_dim == -1 and shards > 1:
        yield from _adafactor_problem(
            config, f"`data_parallel_shard_dim: -1`, which is {shards} of the {known} processes"
        )
    if problem := rows_problem(config, replicas * shards):
        yield problem
        return
    micro_batches = (config.global_batch_size or 0) // (config.batch_size * replicas * shards)
    if config.optimizer_in_bwd and micro_batches > 1:
        yield (
            f"`optimizer_in_bwd` can't be combined with `global_batch_size: {config.global_batch_size}`, which makes {micro_batches} "
            f"micro-batches of `batch_size: {config.batch_size}`: {TOO_EARLY}; set `global_batch_size` to null"
        )
    if known and config.pipeline_parallel_dim > 1 and config.global_batch_size is not None:
        yield from micro_batch_problems(config, micro_batches)


def _adafactor_problem(config: Any, cut_by: str) -> Iterator[str]:
    if _get(config, "optimizer", "type") == "adafactor":
        yield (
            f"`optimizer.type: adafactor` can't be combined with {cut_by}: it takes means over whole rows and columns, which no rank has "
            "where parameters are cut; use copies (`data_parallel_shard_dim: 1` with `data_parallel_replicate_dim`), or another optimizer"
        )


def _layout(config: Any, notes: list[str]) -> Iterator[str]:
    """What of the layout the options alone tell."""
    if not hasattr(config, "tensor_parallel_dim"):
        return
    if problem := Layout.of(config).length_problem(config.tokenizer.max_seq_len, config.sequence_parallel):
        yield problem
    if config.expert_parallel_dim > 1:
        yield "`expert_parallel_dim`: there are no experts in the models that are supported yet; leave it at 1"
    cutting = ("data_parallel_shard_dim", "context_parallel_dim", "tensor_parallel_dim")
    if cuts := [f"`{option}: {getattr(config, option)}`" for option in cutting if getattr(config, option) > 1]:
        yield from _adafactor_problem(config, " or ".join(cuts))
    if config.pipeline_parallel_dim > 1 and getattr(config, "sample_prompts", None):
        yield (
            f"`sample_prompts` can't be combined with `pipeline_parallel_dim: {config.pipeline_parallel_dim}`: text isn't generated "
            "through a pipeline of ranks yet; leave one of them out"
        )


_EXTRAS = {
    ("metric_logger", "tensorboard"): ("tensorboard", "tensorboard"),
    ("metric_logger", "wandb"): ("wandb", "wandb"),
    ("metric_logger", "comet"): ("comet_ml", "comet"),
    ("metric_logger", "mlflow"): ("mlflow", "mlflow"),
    ("optimizer", "adamw_8bit"): ("torchao", "torchao"),
}
"""{(section, type): (package, extra)}."""


def _packages(config: Any, notes: list[str]) -> Iterator[str]:
    for section in ("optimizer", "metric_logger"):
        kind = _get(config, section, "type")
        if kind is None:
            continue
        if (section, kind) in _EXTRAS:
            package, extra = _EXTRAS[section, kind]
            if importlib.util.find_spec(package) is None:
                yield f"`{section}.type: {kind}` needs the package {package}, which is not installed: pip install 'tunesmith[{extra}]'"
        elif "." in kind and not _importable(kind):
            yield f"`{section}.type`: no module {kind.rpartition('.')[0]} can be imported; is its package installed?"


def _importable(dotted: str) -> bool:
    """Whether the package of a dotted path is there; nothing is imported."""
    try:
        return importlib.util.find_spec(dotted.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _get(config: Any, section: str, option: str) -> Any:
    return getattr(getattr(config, section, None), option, None)


_PARTS = (_model, _adapters, _fit, _labels, _reference, _teacher, _tokenizer, _data, _output, _layout, _packages)
