"""The word that was meant: near names, and options as other libraries call them."""

from __future__ import annotations

from typing import Any

from tunesmith.configs import _schema as schema

FOREIGN_NAMES = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size_val",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_grad_norm": "clip_grad_norm",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "gradient_checkpointing": "enable_activation_checkpointing",
    "torch_dtype": "dtype",
    "packing": "packed",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "eval_steps": "run_val_every_n_steps",
    "save_steps": "save_every_n_steps",
    "logging_steps": "log_every_n_steps",
    "save_total_limit": "keep_last_n_checkpoints",
    "model_name_or_path": "model",
    "train_file": "source",
    "bf16": "dtype",
    "fp16": "dtype",
}
"""Options as other libraries call them: only for suggestions."""


def options(cls: type, prefix: str = "") -> dict[str, Any]:
    """{dotted option: its type} of everything that can be set, sections' options included."""
    found: dict[str, Any] = {}
    for name, hint in schema.hints(cls).items():
        found[prefix + name] = hint
        for member in schema.members(hint):
            if schema.is_section(member):
                if schema.choices(hint):
                    found[f"{prefix}{name}.type"] = hint
                found |= {key: type_ for key, type_ in options(member, f"{prefix}{name}.").items() if key not in found}
    return found


def did_you_mean(word: str, names: Any, prefix: str = "") -> str:
    import difflib

    close = difflib.get_close_matches(word, [str(name) for name in names], n=1, cutoff=0.6)
    return f"; did you mean `{prefix}{close[0]}`?" if close else ""
