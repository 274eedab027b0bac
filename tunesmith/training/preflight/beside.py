"""Models that compute beside another: a reference, a teacher, a draft. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.configs.layout import Layout
from tunesmith.configs.stages import stage_layers
from tunesmith.errors import UserError
from tunesmith.hub import follow_latest
from tunesmith.training.preflight.files import ADAPTER_FILE, model_folder, not_a_folder, option_of, weights_folder
from tunesmith.training.preflight.fit import shape_of
from tunesmith.training.vocabulary import read_vocabulary, vocabulary_problem

if TYPE_CHECKING:
    from tunesmith.models.family import DecoderConfig, Family


def teacher_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """The model that another learns from: its files, whether the layout can cut it, and whether both have the same tokens."""
    from tunesmith.models.families import model_config

    if (name := option_of(config, "teacher", "model")) is None:
        return
    folder = follow_latest(Path(name).expanduser())
    if not folder.is_dir():
        yield from (
            [f"`teacher.model`: {name} is a file"] if folder.exists() else not_a_folder("teacher.model", name, notes)
        )
        return
    if (folder / ADAPTER_FILE).is_file() and not (folder / "config.json").is_file():
        yield f"`teacher.model`: {name} is a PEFT adapter; merge it into its base with `tune run export` first"
        return
    yield from (problems := list(model_folder(folder, weights=True)))
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
        student = shape_of(config)
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


def reference_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """The model that a preference method compares with, where another one is named."""
    from tunesmith.models.families import model_config

    name = option_of(config, "reference", "model")
    if name is None:
        return
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from not_a_folder("reference.model", name, notes)
        return
    problems = list(model_folder(folder, weights=True))
    yield from (f"`reference.model`: {problem}" for problem in problems)
    try:
        if not problems and (ours := shape_of(config)) is not None:
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


def draft_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """The model that guesses ahead of another: its files, and whether its guesses can be checked."""
    from tunesmith.models.families import model_config

    if (name := option_of(config, "speculative", "draft_model")) is None:
        return
    folder = follow_latest(Path(name).expanduser())
    if not folder.exists():
        yield from not_a_folder("speculative.draft_model", name, notes)
        return
    if not (folder / ADAPTER_FILE).is_file() or (folder / "config.json").is_file():
        yield from (problems := [f"`speculative.draft_model`: {one}" for one in model_folder(folder, weights=True)])
        if problems:
            return
    try:
        folders = weights_folder(config.model), weights_folder(name)
        if folders[0] is not None and folders[1] is not None:
            check_draft(model_config(folders[0])[2], model_config(folders[1])[2])
    except UserError as error:
        yield str(error)


def check_draft(model: DecoderConfig, draft: DecoderConfig) -> None:
    """Raise UserError for a draft whose tokens aren't the model's, or whose memory of a text can go out of date."""
    if draft.vocab_size != model.vocab_size:
        raise UserError(
            f"the draft model's vocabulary has {draft.vocab_size} tokens, the model's {model.vocab_size}: "
            "take a smaller model of the same family"
        )
    for which, one in (("draft model", draft), ("model", model)):
        if one.depends_on_length:
            raise UserError(
                f"the {which}'s rotary frequencies depend on a text's length, so guesses can't be checked in one pass: "
                "leave the draft out"
            )


def check_plain(hf_config: dict[str, Any], model: str) -> None:
    """Raise UserError where the weights of a reference or a teacher are quantized: they are spread over ranks like the trained ones."""
    if hf_config.get("quantization_config"):
        raise UserError(
            f"{model} is quantized: name the model it was made from, which `quantize: nf4` beside its name holds in 4 bits"
        )


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
