"""Whether a model can be quantized as `tune run quantize` is told. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import UserError
from tunesmith.nn.scheme import Scheme
from tunesmith.training.preflight.files import weights_folder
from tunesmith.training.preflight.fit import uneven_problem

if TYPE_CHECKING:
    from tunesmith.models.family import DecoderConfig, Family


def rounding_problems(config: Any, notes: list[str]) -> Iterator[str]:
    """What the files of a model, and those of texts, tell before any is read whole."""
    if not hasattr(config, "scheme"):
        return
    own, measured = config.calibration.data_files, config.perplexity.text_files
    for option, named in (("calibration.data", own), ("perplexity.files", measured)):
        for file in named:
            if not Path(file).expanduser().is_file():
                yield f"`{option}`: there is no file {file}"
    from tunesmith.models.families import model_config

    try:
        if (folder := weights_folder(config.model, config.base)) is not None:
            check_roundable(config, *model_config(folder))
    except UserError as error:
        yield str(error)


def _of_blocks(scheme: Scheme, layers: Mapping[str, tuple[int, bool]]) -> str:
    named = ", ".join(f"{name} ({inputs})" for name, (inputs, _) in layers.items() if not scheme.fits(inputs))
    return (
        f"`scheme.type: {scheme.type}` has blocks of {scheme.multiple}, which do not divide the inputs of {named}, and bitsandbytes computes "
        "wrong products of such layers on a CPU: leave them as they are with `scheme.skip_indivisible: true`, or take an int8 scheme"
    )


def check_roundable(config: Any, hf_config: dict[str, Any], family: Family, shape: DecoderConfig) -> None:
    """Raise UserError for a model that is quantized already, has layers that the groups don't fit, or can't be given the texts."""
    if hf_config.get("quantization_config"):
        raise UserError(f"{config.model} is quantized already: name the model that it was made from")
    reads_text = bool(config.perplexity.files) or config.calibration.method != "none"
    if reads_text and family.scores(hf_config) is not None:
        raise UserError(
            f"{config.model} gives scores, not words, and has no perplexity: leave `perplexity` and `calibration` out"
        )
    scheme = Scheme(config.scheme.type, config.scheme.group_size)
    layers = family.linear_inputs(shape)
    if problem := uneven_problem("scheme", config.scheme, scheme.multiple, layers):
        raise UserError(problem if scheme.group_size else _of_blocks(scheme, layers))
    for option in ("calibration", "perplexity"):
        longest = getattr(config, option).max_seq_len
        if reads_text and longest is not None and longest > shape.context_length:
            raise UserError(
                f"`{option}.max_seq_len` = {longest} is more than the {shape.context_length} tokens that the model is made for"
            )
