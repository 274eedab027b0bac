"""What became of the rows of a data set. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SourceReport:
    """One source. Examples are places, such as data.jsonl:17."""

    source: str
    rows_read: int = 0
    rows_used: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    """{reason: (rows, an example)}."""
    truncated: int = 0
    truncated_example: str = ""
    max_seq_len: int = 0
    units: str = ""
    """What the rows used are in preference data, such as 100 pairs."""
    row_capacity: int = 0
    """Tokens of a packed row."""
    documents: int = 0
    """Documents a pass over the source holds; more than rows_used where long texts were cut into pieces."""
    tokens: int = 0
    """Inputs of one pass, without padding."""
    trained_tokens: int = 0
    """Labels of one pass."""
    training_rows: int = 0
    """Rows the model sees in one pass; each holds several documents where the source is packed."""
    packed: bool = False
    streaming: bool = False
    from_cache: bool = False
    share: float = 1.0
    """Share of the rows drawn from this source."""

    @property
    def fill(self) -> float:
        """Share of a packed row that is not padding."""
        return self.tokens / max(1, self.training_rows * self.row_capacity)

    def __str__(self) -> str:
        if self.streaming and not self.rows_read:
            return f"{self.source}: streamed, rows of up to {self.row_capacity:,} tokens"
        parts = [f"{self.source}: {self.rows_used:,} of {self.rows_read:,} rows used"]
        if self.units:
            parts[0] += f" as {self.units}"
        if self.packed:
            parts[0] += (
                f", packed into {self.training_rows:,} rows of {self.row_capacity:,} tokens ({self.fill:.1%} filled)"
            )
        elif self.training_rows != self.rows_used and not self.units:
            parts[0] += f", cut into {self.training_rows:,}"
        parts.append(f"{self.tokens:,} tokens, {self.trained_tokens / max(1, self.tokens):.0%} in the loss")
        if self.truncated:
            parts.append(
                f"{self.truncated:,} truncated to {self.max_seq_len:,} tokens (such as {self.truncated_example})"
            )
        parts += [
            f"{count:,} skipped: {reason} (such as {example})" for reason, (count, example) in self.skipped.items()
        ]
        return "; ".join(parts)


@dataclass
class DataReport:
    """What became of the rows, source by source."""

    sources: list[SourceReport]

    def __str__(self) -> str:
        if len(self.sources) == 1:
            return f"data: {self.sources[0]}"
        return "\n".join(f"data, {source.share:.1%} of rows from {source}" for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """For data_report.json; totals beside the sources."""
        totals = {
            name: sum(getattr(source, name) for source in self.sources)
            for name in ("rows_read", "rows_used", "truncated", "tokens", "trained_tokens", "training_rows")
        }
        packed = [source for source in self.sources if source.packed and source.training_rows]
        room = sum(source.training_rows * source.row_capacity for source in packed)
        return {
            **totals,
            "skipped": sum(count for source in self.sources for count, _ in source.skipped.values()),
            "fill": sum(source.tokens for source in packed) / room if room else None,
            "sources": [asdict(source) for source in self.sources],
        }
