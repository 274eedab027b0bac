"""report.html of an evaluation: tables, what differs, and some of what the model was asked and said. One file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tunesmith.training.report
from tunesmith.eval.tables import Table, number

_SAMPLES = 3
"""Examples of each task that are shown."""
_LONGEST = 2000
"""Characters of a question that are shown: its end, which is what is answered."""


def write_report(
    folder: Path, title: str, facts: Sequence[str], tables: Sequence[Table], results: dict[str, Any] | None, config: str
) -> Path:
    """Write `folder`/report.html; `results` are the harness's of the first model, with its samples. Returns its path."""
    import jinja2

    places = [Path(__file__).parent, Path(tunesmith.training.report.__file__).parent]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(places),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = page.get_template("evaluation.html.jinja").render(
        title=title, facts=facts, tables=tables, tasks=_tasks(results) if results else [], config=config
    )
    temporary = folder / "report.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "report.html")
    return folder / "report.html"


def _tasks(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The first examples of each task."""
    return [
        {"name": name, "samples": [_sample(sample) for sample in _one_a_question(samples)[:_SAMPLES]]}
        for name, samples in results["samples"].items()
    ]


def _one_a_question(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({sample["doc_id"]: sample for sample in reversed(samples)}.values())[::-1]


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    question = str(sample["arguments"][0][0]) if len(sample["arguments"][0]) > 1 else ""
    scores = [f"{name} {number(sample[name])}" for name in sample["metrics"] if isinstance(sample[name], int | float)]
    return {
        "question": question if len(question) <= _LONGEST else "…" + question[-_LONGEST:],
        "target": str(sample["target"]),
        "answers": [_answer(arguments, answers) for arguments, answers in zip(sample["arguments"], sample["resps"])],
        "scores": ", ".join(scores),
    }


def _answer(arguments: Sequence[Any], answers: list[Any]) -> dict[str, str]:
    """What was said to one request, or how likely a given answer is."""
    first = answers[0]
    if isinstance(first, str):
        return {"name": "answer", "text": first}
    log_prob = first[0] if isinstance(first, tuple | list) else first
    return {"name": f"log p {number(float(log_prob))}", "text": str(arguments[-1])[:_LONGEST]}
