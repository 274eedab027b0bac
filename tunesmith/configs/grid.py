"""Which methods train which weights, and where: what `tune ls` prints, README.md shows, and tests/recipes/test_grid.py runs."""

from __future__ import annotations

METHODS = {
    "pretrain": "next tokens of plain text, from scratch or further",
    "sft": "answers",
    "preference": "preferred over rejected answers",
    "reward": "scores: pairs, classes, steps",
    "distill": "a teacher's distributions",
}
"""{recipe: what it raises the likelihood of, or learns}."""

WEIGHTS = {
    "full": [],
    "lora": ["+lora"],
    "dora": ["+dora"],
    "qlora": ["+qlora"],
    "qat": ["+qat"],
    "qat + lora": ["+lora", "+qat"],
}
"""{weights: the overlays that choose them}."""

SCALES = {
    "one process": [],
    "FSDP": ["data_parallel_shard_dim=-1"],
    "copies": ["data_parallel_replicate_dim=N"],
    "tensor": ["tensor_parallel_dim=N"],
    "context": ["context_parallel_dim=N"],
    "pipeline": ["pipeline_parallel_dim=N"],
}
"""{layout: the option that asks for it}; they combine."""


def cell(method: str, weights: str) -> str:
    """What a method with these weights needs beside its name."""
    if method == "pretrain" and weights not in ("full", "qat"):
        return "from_scratch=false"  # adapters stand beside trained weights
    return "yes"


def markdown() -> str:
    """The grid as a table."""
    rows = [["", *WEIGHTS], ["---"] * (1 + len(WEIGHTS))]
    rows += [
        [f"`{method}`: {what}", *(cell(method, weights) for weights in WEIGHTS)] for method, what in METHODS.items()
    ]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    scales = ", ".join(f"{name} (`{option[0]}`)" if option else name for name, option in SCALES.items())
    return f"{lines}\n\nEach on {scales}, and on these combined.\n"


def plain() -> list[str]:
    """The grid for a terminal, line by line."""
    rows = [["", *(" ".join(overlays) or "full" for overlays in WEIGHTS.values())]]
    rows += [[method, *(cell(method, weights) for weights in WEIGHTS)] for method in METHODS]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    return ["".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
