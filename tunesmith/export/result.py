"""What an export wrote, and how far what its consumer reads is from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.training.progress import format_bytes


@dataclass(frozen=True)
class Check:
    """One comparison of what a consumer reads with the model."""

    consumer: str
    """Who read the files: "transformers", "llama.cpp"."""
    compared: str
    """What was compared, in the plural: "logits", "weights"."""
    difference: float
    """The largest, relative to the largest number compared."""
    tolerance: float

    def __post_init__(self):
        if not self.difference <= self.tolerance:  # also where it is no number
            raise UserError(
                f"{self.consumer}: the {self.compared} differ from the model's by {self.difference:.2e} of the largest, more than "
                f"{self.tolerance:.2g}: nothing was written; if `tolerance` is not too small for the number type, report it"
            )

    def __str__(self) -> str:
        return (
            f"read back by {self.consumer}: largest difference of the {self.compared} {self.difference:.1e} of the largest "
            f"(tolerance {self.tolerance:.2g})"
        )


@dataclass(frozen=True)
class Exported:
    """What an export wrote; every check in it has passed."""

    checks: Sequence[Check]
    notes: Sequence[str] = field(default_factory=tuple)
    """What a user should know besides: one sentence each."""

    def lines(self, output: Path) -> list[str]:
        """What to print about it, once it lies in `output`."""
        files = [path for path in output.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        wrote = f"wrote {output}: {len(files)} file{'s' * (len(files) != 1)}, {format_bytes(size)}"
        return [wrote, *map(str, self.checks), *self.notes]
