"""What can be checked before weights are loaded: model and adapter files, data, templates, packages, folders. Imports no torch."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.training.preflight.beside import (
    check_draft,
    check_plain,
    check_reference,
    draft_problems,
    frozen_layout_problems,
    frozen_stages,
    reference_problems,
    teacher_problems,
)
from tunesmith.training.preflight.data import data_problems
from tunesmith.training.preflight.evaluation import evaluation_problems
from tunesmith.training.preflight.export import check_exportable, export_problems
from tunesmith.training.preflight.files import (
    adapter_problems,
    base_of_none,
    damaged,
    model_problems,
    warn_of_another_base,
)
from tunesmith.training.preflight.fit import (
    check_trainable,
    check_vocabulary,
    fit_problems,
    group_problems,
    label_problems,
    labels_of,
    layout_problems,
    spread_quantized,
    tokenizer_problems,
    warn_of_length,
    warn_of_unloadable,
)
from tunesmith.training.preflight.machine import (
    is_restart,
    layout_option_problems,
    output_problems,
    package_problems,
    process_problems,
)
from tunesmith.training.preflight.rounding import check_roundable, rounding_problems

__all__ = [
    "base_of_none",
    "check",
    "check_draft",
    "check_exportable",
    "check_plain",
    "check_reference",
    "check_roundable",
    "check_trainable",
    "check_vocabulary",
    "damaged",
    "frozen_layout_problems",
    "frozen_stages",
    "group_problems",
    "is_restart",
    "labels_of",
    "layout_problems",
    "spread_quantized",
    "warn_of_another_base",
    "warn_of_length",
    "warn_of_unloadable",
]


def check(config: Any, processes: int | None = None, folder_is_checked_later: bool = False) -> list[str]:
    """Check a loaded config against the machine and its files; returns what could not be checked yet.

    processes: how many the run will have; 0 where that is not known yet, None for as many as were started.
    folder_is_checked_later: leave `output_dir` to the run itself: other nodes may write into it already. Raises ConfigError with one line per finding.
    """
    notes: list[str] = []
    parts = [part for part in _PARTS if not (folder_is_checked_later and part is output_problems)]
    findings = [finding for part in parts for finding in part(config, notes)]
    findings += process_problems(config, processes)
    if findings:
        raise ConfigError("\n".join(dict.fromkeys(findings)))
    return notes


_PARTS = (
    model_problems,
    adapter_problems,
    fit_problems,
    label_problems,
    reference_problems,
    teacher_problems,
    draft_problems,
    rounding_problems,
    export_problems,
    tokenizer_problems,
    data_problems,
    evaluation_problems,
    output_problems,
    layout_option_problems,
    package_problems,
)
