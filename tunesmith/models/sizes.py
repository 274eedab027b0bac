"""How a named size is written down."""

from __future__ import annotations

from typing import Any


def shape(
    common: dict[str, Any],
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    **more: Any,
) -> dict[str, Any]:
    """A whole config.json: what the sizes of a model have in common, and what sets this one apart."""
    return {
        **common,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        **more,
    }
