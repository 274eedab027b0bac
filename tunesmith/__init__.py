"""tunesmith: the whole life of a language model, in PyTorch.

import tunesmith                                       # imports nothing heavy until used
model = tunesmith.load_model("folder-or-hub-id", dtype="bfloat16", device="cuda")
tokenizer = tunesmith.load_tokenizer("folder-or-hub-id")
texts = tunesmith.generate(model, tokenizer, ["Once upon a time"], max_new_tokens=64, temperature=0.0)
tunesmith.save_model(model, "folder", tokenizer)
config = tunesmith.load_config("sft", "+lora", "model=…", "batch_size=4"); tunesmith.run(config)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_model": "tunesmith.training.load",
    "save_model": "tunesmith.checkpoint.hf",
    "load_tokenizer": "tunesmith.data.tokenizer",
    "generate": "tunesmith.generation.completions",
    "load_config": "tunesmith.config",
    "dump_config": "tunesmith.config",
    "run": "tunesmith.config",
    "UserError": "tunesmith.errors",
    "ConfigError": "tunesmith.errors",
}

if TYPE_CHECKING:
    from tunesmith.checkpoint.hf import save_model
    from tunesmith.config import dump_config, load_config, run
    from tunesmith.data.tokenizer import load_tokenizer
    from tunesmith.errors import ConfigError, UserError
    from tunesmith.generation.completions import generate
    from tunesmith.training.load import load_model

__all__ = [
    "ConfigError",
    "UserError",
    "dump_config",
    "generate",
    "load_config",
    "load_model",
    "load_tokenizer",
    "run",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
