"""report.html: what a person looks at after a run. One file that needs nothing else."""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from tunesmith.training.charts import Chart, Curve, Points, build_chart, format_number, smooth
from tunesmith.training.metrics import read_metrics
from tunesmith.training.progress import format_seconds


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the run left there; every part may be missing. Returns its path.

    Reads config.yaml, metrics.jsonl, samples.jsonl (rows {step, prompt, text}), data_report.json and environment.json.
    """
    import jinja2

    folder = Path(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    config_text = _read_text(folder / "config.yaml")
    config = _read_yaml(config_text)
    environment = _read_json(folder / "environment.json")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = page.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        model=str(config.get("model") or ""),
        tiles=_tiles(rows),
        facts=_facts(config, environment, rows),
        charts=_charts(rows),
        samples=_samples(_read_lines(folder / "samples.jsonl")),
        data_report=_table(_read_json(folder / "data_report.json")),
        config=config_text,
    )
    temporary = folder / "report.html.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "report.html")
    return folder / "report.html"


# --- charts and numbers --------------------------------------------------------------------------


def _charts(rows: list[dict[str, Any]]) -> list[Chart]:
    validation = Curve("validation", _series(rows, "val_loss"), "orange")
    charts = [
        build_chart("Loss", [*_curves(rows, "loss", "training"), validation]),
        build_chart("Learning rate", [Curve("learning rate", _series(rows, "lr"), "blue")], from_zero=True),
        build_chart("Gradient norm", _curves(rows, "grad_norm", "gradient norm"), from_zero=True),
        build_chart("Throughput", _curves(rows, "tokens_per_second", "throughput"), "tokens/s", from_zero=True),
        build_chart(
            "Model FLOP/s of a device", _curves(rows, "tflops_per_device", "model FLOP/s"), "TFLOP/s", from_zero=True
        ),
        build_chart("Waiting for data", _curves(rows, "data_seconds", "waiting for data"), "s", from_zero=True),
        build_chart(
            "Peak memory", [Curve("peak memory", _series(rows, "peak_memory_gib"), "blue")], "GiB", from_zero=True
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _curves(rows: list[dict[str, Any]], field: str, name: str) -> list[Curve]:
    """A noisy field: as it is where it is short, else pale with a smooth line over it."""
    points = _series(rows, field)
    if len(points) < 20:
        return [Curve(name, points, "blue")]
    return [
        Curve("each step", points, "blue", is_faint=True),
        Curve("training, smoothed" if field == "loss" else "smoothed", smooth(points), "blue"),
    ]


def _series(rows: list[dict[str, Any]], name: str) -> Points:
    """The values of one field; None where it was there and not a finite number."""
    points: Points = []
    for row in rows:
        if name in row:
            value = row[name]
            is_number = isinstance(value, int | float) and math.isfinite(value)
            points.append((row["step"], float(value) if is_number else None))
    return points


def _finite(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(step, value) for step, value in _series(rows, name) if value is not None]


def _tiles(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The numbers that matter most, each with a line of explanation."""
    tiles = []
    loss = _series(rows, "loss")
    if loss:
        step, value = loss[-1]
        start = next((value for _, value in loss if value is not None), None)
        tiles.append(
            {
                "name": "Final loss",
                "value": format_number(value),
                "more": f"from {format_number(start)}" if len(loss) > 1 else f"at step {step:,.0f}",
            }
        )
    validation = _finite(rows, "val_loss")
    if validation:
        step, value = min(validation, key=lambda point: point[1])
        tiles.append({"name": "Best val loss", "value": format_number(value), "more": f"at step {step:,.0f}"})
    if rows:
        tiles.append({"name": "Steps", "value": f"{rows[-1]['step']:,}", "more": _epochs(rows)})
    tokens = _finite(rows, "num_tokens")
    if tokens:
        tiles.append({"name": "Tokens", "value": format_number(tokens[-1][1]), "more": "padding included"})
    seconds = _training_seconds(rows)
    if seconds:
        tiles.append({"name": "Time in steps", "value": format_seconds(seconds), "more": ""})
    speed = [value for _, value in _finite(rows, "tokens_per_second")]
    if speed:
        tiles.append(
            {"name": "Throughput", "value": format_number(round(statistics.median(speed))), "more": "tokens/s, median"}
        )
    tiles += _work(rows)
    memory = [value for _, value in _finite(rows, "peak_memory_gib")]
    if memory:
        tiles.append({"name": "Peak memory", "value": f"{max(memory):.2f} GiB", "more": ""})
    return tiles


def _work(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Model FLOP/s of a device, with their share of its peak where that is known, and the share of the time spent waiting for data."""
    tiles = []
    tflops = [value for _, value in _finite(rows, "tflops_per_device")]
    if tflops:
        shares = [value for _, value in _finite(rows, "mfu")]
        more = f"TFLOP/s, MFU {statistics.median(shares):.1%}" if shares else "TFLOP/s a device, median"
        tiles.append({"name": "Model FLOP/s", "value": f"{statistics.median(tflops):,.3g}", "more": more})
    waited, seconds = _training_seconds(rows, "data_seconds"), _training_seconds(rows)
    if waited and seconds:
        tiles.append({"name": "Waiting for data", "value": f"{waited / seconds:.1%}", "more": "of the time in steps"})
    return tiles


def _epochs(rows: list[dict[str, Any]]) -> str:
    epochs = _finite(rows, "epoch")
    return f"epoch {format_number(epochs[-1][1])}" if epochs else ""


def _training_seconds(rows: list[dict[str, Any]], name: str = "step_seconds") -> float:
    """Seconds of all steps; a logged line tells the mean of those since the one before."""
    total, previous = 0.0, 0
    for step, seconds in _finite(rows, name):
        total, previous = total + seconds * (step - previous), int(step)
    return total


def _facts(config: dict[str, Any], environment: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Where and how it ran, in a few words each."""
    weights = config.get("weights")
    facts = [
        environment.get("device") or config.get("device"),
        config.get("dtype"),
        weights.get("type") if isinstance(weights, dict) else None,
    ]
    facts += [f"{name} {environment[name]}" for name in ("tunesmith", "torch", "python") if name in environment]
    return [str(fact) for fact in facts if fact]


# --- samples and data ----------------------------------------------------------------------------


def _samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt its first and its last text."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        prompt = row.get("prompt", "")
        by_prompt.setdefault(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False), []).append(
            row
        )
    samples = []
    for prompt, texts in by_prompt.items():
        texts.sort(key=lambda row: row.get("step", 0))
        shown = [texts[0], texts[-1]] if len(texts) > 1 else texts
        samples.append(
            {
                "prompt": prompt,
                "texts": [{"step": row.get("step", 0), "text": str(row.get("text", ""))} for row in shown],
            }
        )
    return samples


def _table(content: Any, depth: int = 0) -> list[tuple[str, Any]]:
    """A JSON object as rows of (name, text or a table of its own)."""
    if not isinstance(content, dict):
        return []
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, dict) and depth < 3:
            rows.append((_words(name), _table(value, depth + 1)))
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value) and depth < 3:
            rows.append(
                (_words(name), [(str(number), _table(item, depth + 1)) for number, item in enumerate(value, 1)])
            )
        else:
            rows.append((_words(name), _as_text(value)))
    return rows


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_number(value) if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- files ---------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    return json.loads(text) if text else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read_text(path).split("\n") if line.strip()]


def _read_yaml(text: str) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(text)
    return content if isinstance(content, dict) else {}
