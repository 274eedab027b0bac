"""Results as tables, for the terminal and the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tunesmith.eval.compare import Difference
from tunesmith.eval.texts import TextScore


@dataclass(frozen=True)
class Table:
    """Cells are texts."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    numeric: tuple[int, ...]
    """Columns of numbers, which are set to the right."""


def task_table(name: str, results: dict[str, Any]) -> Table:
    """One model's scores: the harness's numbers."""
    headers = ["task", "filter", "shots", "metric", "value", "±", "examples"]
    rows = []
    for task, depth in _in_order(results):
        of_task = results["results"][task]
        for key in sorted(key for key in of_task if "," in key and not key.partition(",")[0].endswith("_stderr")):
            metric, _, filter_name = key.partition(",")
            better = {True: " ↑", False: " ↓"}.get(results["higher_is_better"].get(task, {}).get(metric), "")
            error = of_task.get(f"{metric}_stderr,{filter_name}")
            shown = number(error) if isinstance(error, float) else ""
            count = results["n-samples"].get(task, {}).get("effective", of_task.get("sample_len", ""))
            label = "  " * depth + str(of_task.get("alias", task)).strip(" -")
            shots = str(results["n-shot"].get(task, ""))
            rows.append([label, filter_name, shots, metric + better, number(of_task[key]), shown, str(count)])
    return Table(f"Tasks: {name}", headers, rows, (2, 4, 5, 6))


def text_table(name: str, texts: Sequence[TextScore]) -> Table:
    """One model's perplexities."""
    headers = ["text", "perplexity", "by word", "by byte", "bits/byte", "tokens", "words", "bytes"]
    rows = []
    for text in texts:
        row = text.row()
        values = [row[key] for key in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")]
        rows.append([text.file, *map(number, values), *(f"{row[key]:,}" for key in ("tokens", "words", "bytes"))])
    return Table(f"Perplexity: {name}", headers, rows, tuple(range(1, len(headers))))


def difference_table(first: str, other: str, differences: Sequence[Difference]) -> Table:
    """Two models side by side."""
    headers = ["task", "metric", "first", "other", "difference", "95 % interval", "verdict", "by", "examples"]
    rows = []
    for one in differences:
        has_interval = one.low is not None and one.high is not None
        interval = f"{one.low:+.4f} to {one.high:+.4f}" if has_interval else ""
        name = one.metric if one.filter == "none" else f"{one.metric} ({one.filter})"
        values = [number(one.first_value), number(one.other_value), f"{one.difference:+.4f}"]
        rows.append([one.task, name, *values, interval, one.verdict, one.method, f"{one.samples:,}"])
    return Table(f"{other} (other) against {first} (first)", headers, rows, (2, 3, 4, 8))


def number(value: Any) -> str:
    """A score as a person reads it."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4f}"


def print_table(table: Table, stream: TextIO) -> None:
    """With lines in a terminal, plain columns elsewhere."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        stream.write(plain(table) + "\n")
        return
    import rich.table
    from rich.console import Console

    drawn = rich.table.Table(title=table.title, title_justify="left")
    for index, header in enumerate(table.headers):
        is_number = index in table.numeric
        drawn.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    Console(file=stream, markup=False).print(drawn)


def plain(table: Table) -> str:
    """Columns with spaces between them."""
    lines = [table.headers, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.headers))]
    text = [table.title]
    for line in lines:
        cells = [
            cell.rjust(width) if index in table.numeric else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text) + "\n"


def _in_order(results: dict[str, Any]) -> list[tuple[str, int]]:
    """Tasks and groups, each under the group that holds it, with how deep it stands."""
    children = results.get("group_subtasks", {})
    inner = {child for names in children.values() for child in names}
    ordered: list[tuple[str, int]] = []

    def visit(name: str, depth: int) -> None:
        if name in results["results"]:
            ordered.append((name, depth))
        for child in children.get(name, []):
            visit(child, depth + 1)

    for name in [*children, *results["results"]]:
        if name not in inner and name not in {done for done, _ in ordered}:
            visit(name, 0)
    return ordered
