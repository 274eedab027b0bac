"""Whether model, tokenizer, adapter and layout fit together: told before data are read."""

from __future__ import annotations

from pathlib import Path

from tunesmith import hub
from tunesmith.configs.shared import TrainSettings
from tunesmith.configs.weights import LoRAWeights
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.errors import UserError
from tunesmith.nn.lora import freeze_base
from tunesmith.parallel.mesh import Mesh
from tunesmith.training.build import check_weights, construct_frozen, construct_model
from tunesmith.training.flops import Flops, forward_flops, training_flops
from tunesmith.training.preflight import (
    group_problems,
    layout_problems,
    warn_of_another_base,
    warn_of_length,
    warn_of_unloadable,
)
from tunesmith.training.source import Source


def check_fit(
    config: TrainSettings,
    source: Source,
    tokenizer: Tokenizer,
    mesh: Mesh,
    resume_from: Path | None,
    beside: Source | None,
) -> tuple[Flops, list[str]]:
    """What a step costs, and warnings of what may not fit. Raises UserError for what does not.

    beside: a frozen model that computes along with every step.
    """
    shape = source.family.read_config(source.hf_config)
    problems = [*layout_problems(config, shape), *group_problems(config, source.family, shape)]
    if problems:
        raise UserError("\n".join(problems))
    model, first_new_row = construct_model(config, source, tokenizer, mesh, resume_from)
    if resume_from is None and not getattr(config, "from_scratch", False):
        check_weights(source, model, first_new_row)
    if isinstance(config.weights, LoRAWeights):
        freeze_base(model)
    flops = training_flops(model)
    if beside is not None:
        frozen, first_new_row = construct_frozen(config, beside, tokenizer)
        check_weights(beside, frozen, first_new_row)
        flops += forward_flops(frozen, shape.num_hidden_layers)
    warnings = [
        warn_of_length(config, shape),
        warn_of_unloadable(source.family, per_token=getattr(config, "task", None) == "process"),
    ]
    if (adapter := getattr(config.weights, "adapter", None)) and resume_from is None:
        warnings.append(warn_of_another_base(hub.resolve(adapter, what="adapter"), source.name))
    return flops, [warning for warning in warnings if warning]
