"""How model, tokenizer and settings go together. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.configs.layout import Layout
from tunesmith.configs.stages import stage_layers
from tunesmith.errors import UserError
from tunesmith.hub import follow_latest, read_json, tokenizer_file
from tunesmith.nn.scheme import Scheme
from tunesmith.training.preflight.files import not_a_folder, option_of

if TYPE_CHECKING:
    from tunesmith.models.family import DecoderConfig, Family


def fit_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """What the numbers in config.json decide for a run that trains, or spreads a model over ranks."""
    if not hasattr(config, "weights"):
        if getattr(config, "tensor_parallel_dim", 1) > 1:
            for model in (config.model, *getattr(config, "compared", ())):
                yield from _spread_problems(config, model, config.quantize_base)
            if draft := option_of(config, "speculative", "draft_model"):
                yield from _spread_problems(config, draft, quantize=False)
        return
    from tunesmith.nn.targets import choose_layers

    try:
        if (found := shape_of(config)) is None:
            return
        family, shape = found
        check_trainable(config, _config_json(config.model))
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


def _spread_problems(config: Any, model: str, quantize: bool) -> Iterator[str]:
    """What keeps a `model` that only computes from being held by several ranks together. quantize: it is held in 4-bit numbers."""
    try:
        found = shape_of(config, model)
    except UserError as error:
        yield str(error)
        return
    if _config_json(model).get("quantization_config"):
        yield spread_quantized(model)
    elif found is not None:
        which = "" if model == config.model else f"{model}: "
        for problem in Layout.of(config).problems(found[1], quantized=quantize):
            yield which + problem


def spread_quantized(model: str | Path) -> str:
    """The sentence for a model whose rounded weights can't be cut."""
    return f"{model} is quantized, and such a model is not spread over ranks: leave `tensor_parallel_dim` at 1"


def label_problems(config: Any, notes: list[str]) -> Iterator[str]:
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


def layout_problems(config: Any, shape: DecoderConfig) -> Iterator[str]:
    """One sentence for everything of the model's `shape` that the layout of a run that trains can't cut."""
    yield from Layout.of(config).problems(shape, quantized=bool(option_of(config, "weights", "quantize_base")))
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
    if qat is None or Scheme.trained(qat.type, qat.group_size).group_size is None:
        return
    layers = family.linear_inputs(shape)
    if problem := uneven_problem("qat", qat, qat.group_size, layers):
        yield problem
        return
    tp = config.tensor_parallel_dim
    for name, (inputs, is_cut) in layers.items():
        if is_cut and inputs % qat.group_size == 0 and inputs % tp == 0 and inputs // tp % qat.group_size:
            yield (
                f"`qat` keeps `group_size` = {qat.group_size} weights together, and `tensor_parallel_dim: {tp}` would cut the "
                f"{inputs} inputs of {name} into {inputs // tp} for each rank: take fewer ranks, or smaller groups"
            )


def uneven_problem(option: str, section: Any, group_size: int, layers: Mapping[str, tuple[int, bool]]) -> str | None:
    """The sentence for linear layers whose inputs are no whole groups, where `section`, called `option`, doesn't leave them out; None: there is nothing wrong.

    layers: {name: (inputs, whether tensor parallelism cuts them)}.
    """
    uneven = [name for name, (inputs, _) in layers.items() if inputs % group_size]
    if not uneven or (section.skip_indivisible and len(uneven) < len(layers)):
        return None
    named = ", ".join(f"{name} ({layers[name][0]})" for name in uneven)
    fitting = math.gcd(*(inputs for inputs, _ in layers.values()))
    cure = f"take {_largest_divisor(fitting, group_size)}, or another divisor of {fitting}"
    if len(uneven) < len(layers):
        cure += f"; or leave such layers as they are with `{option}.skip_indivisible: true`"
    return f"`{option}.group_size` = {group_size} does not divide the inputs of {named}: {cure}"


def _largest_divisor(number: int, most: int) -> int:
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def check_trainable(config: Any, hf_config: dict[str, Any]) -> None:
    """Raise UserError where the weights are quantized: what was rounded can't take small steps. Adapters on NF4 weights can."""
    content = hf_config.get("quantization_config")
    if not content:
        return
    if Scheme.of_config(content).type != "nf4" or config.weights.type != "lora":
        more = "" if config.weights.type == "lora" else "; of models in NF4, adapters can be (`weights.type: lora`)"
        raise UserError(f"{config.model} is quantized, and can't be trained: name the model it was made from{more}")
    if config.qat is not None or config.tensor_parallel_dim > 1:
        raise UserError(
            f"{config.model} is quantized: adapters on it go neither with `qat` nor with `tensor_parallel_dim` above 1; name the model it "
            "was made from"
        )


def _config_json(model: str) -> dict[str, Any]:
    file = follow_latest(Path(model).expanduser()) / "config.json"
    return read_json(file) if file.is_file() else {}


def shape_of(config: Any, model: str | None = None) -> tuple[Family, DecoderConfig] | None:
    """Family and numbers of `model`, or the config's, where they are here. Raises UserError for what is wrong with them."""
    from tunesmith.models.families import model_config, named_sizes

    name: str = model or config.model
    folder, changes = follow_latest(Path(name).expanduser()), getattr(config, "model_args", None) or {}
    if (folder / "config.json").is_file():
        hf_config, family, shape = model_config(folder)
    elif name.count("/") == 1 and name in named_sizes():
        family, hf_config, _ = named_sizes()[name]
        shape = family.read_config(hf_config)
    else:
        return None
    return family, family.read_config({**hf_config, **changes}) if changes else shape


def _count_tokens(config: Any, rows: int) -> int:
    """How many tokens tokenizer.json (or vocab.json) and `tokenizer.add_tokens` make, where that may be more than `rows`; else 0.

    To parse a large file takes most of a second: first it is searched for a number that could be such an id.
    """
    place, added = Path(config.tokenizer.path or config.model).expanduser(), dict.fromkeys(config.tokenizer.add_tokens)
    file = follow_latest(place)
    if file.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.json") if (file / name).is_file()]
        file /= (*names, "tokenizer.json")[0]
    if file.suffix != ".json" or not file.is_file():
        return 0
    content, spare = file.read_bytes(), max(0, rows - len(added))
    if not any(int(number) >= spare for number in re.findall(rb":\s*(\d{%d,9})\b" % len(str(spare)), content)):
        return 0
    try:
        parsed = json.loads(content)
        if file.name == "vocab.json":
            ids = dict(parsed)
        else:
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


def tokenizer_problems(config: Any, notes: list[str]) -> Iterator[str]:
    tokenizer = getattr(config, "tokenizer", None)
    if tokenizer is None:
        return
    if tokenizer.path is not None and not Path(tokenizer.path).expanduser().exists():
        yield from not_a_folder("tokenizer.path", tokenizer.path, notes)
    folder = follow_latest(Path(tokenizer.path or config.model).expanduser())
    if folder.is_dir() and (tokenizer.path or (folder / "config.json").is_file()):
        try:
            tokenizer_file(folder)
        except UserError as error:
            yield str(error)
    template = tokenizer.chat_template
    built_in = Path(__file__).parents[2] / "data" / "templates"
    if (
        template is not None
        and "{{" not in template
        and "{%" not in template
        and not Path(template).expanduser().is_file()
    ):
        names = sorted(file.stem for file in built_in.glob("*.jinja"))
        if template not in names:
            yield f"`tokenizer.chat_template`: no file {template}, and no built-in template of that name ({', '.join(names)})"
