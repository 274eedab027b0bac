"""report.html: self-contained, complete, correct at the edges."""

import json
import math
import re
import time
from html.parser import HTMLParser

import pytest

from tunesmith.training.charts import Curve, build_chart, format_number, nice_ticks, smooth, thin
from tunesmith.training.report import write_report

EVIL = "<script>alert('x')</script>&\"{{ 7 * 7 }}"


def write_run(folder, rows, **files):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        suffix = {"samples": "jsonl", "config": "yaml"}.get(name, "json")
        text = (
            "".join(json.dumps(row) + "\n" for row in content)
            if name == "samples"
            else content
            if isinstance(content, str)
            else json.dumps(content)
        )
        (folder / f"{name}.{suffix}").write_text(text)
    return write_report(folder).read_text()


def row(step, **values):
    return {
        "step": step,
        "loss": 3.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-4,
        "tokens_per_second": 1000.0,
        "num_tokens": 100 * step,
        "step_seconds": 0.5,
        "peak_memory_gib": 1.25,
        **values,
    }


class Reader(HTMLParser):
    """Collects tags and checks that they close."""

    def __init__(self):
        super().__init__()
        self.stack, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.text += data + " "


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.stack == []
    return reader


def titles(page):
    return re.findall(r"<figcaption><h3>(.*?)</h3>", page)


def test_a_whole_run(tmp_path):
    rows = [row(step) for step in range(1, 41)] + [{"step": 20, "val_loss": 0.9}, {"step": 40, "val_loss": 0.7}]
    page = write_run(
        tmp_path / "my run",
        rows,
        samples=[
            {"step": 0, "prompt": "Hi", "text": "blub"},
            {"step": 40, "prompt": "Hi", "text": "Hello!"},
            {"step": 20, "prompt": "Hi", "text": "Hel"},
        ],
        data_report={
            "rows_read": 1234,
            "skipped": {"empty answer": {"rows": 5, "example": "a.json:3"}},
            "fill": 0.985,
            "nothing": None,
        },
        environment={"device": "NVIDIA H200", "torch": "2.13.0", "tunesmith": "0.1.0"},
        config="model: Qwen/Qwen3-0.6B\nweights:\n  type: lora\n",
    )
    text = " ".join(read(page).text.split())
    assert titles(page) == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"]
    for part in (
        "my run", "Qwen/Qwen3-0.6B", "NVIDIA H200", "lora", "torch 2.13.0", "Final loss 0.075 from 3", "Best val loss 0.7 at step 40", "Steps 40", "Tokens 4,000",
        "Time in steps 20 s", "Throughput 1,000 tokens/s, median", "Peak memory 1.25 GiB", "Hi before training blub after step 40 Hello!", "rows read 1,234",
        "empty answer rows 5 example a.json:3", "fill 0.985",
    ):  # fmt: skip
        assert part in text, part
    assert "Hel after" not in text and "nothing" not in text
    assert "type: lora" in page


def test_it_needs_nothing_else(tmp_path):
    page = write_run(tmp_path / "run", [row(1), row(2)])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert not any(
        tag in ("link", "img", "iframe") or "src" in attributes or "href" in attributes
        for tag, attributes in read(page).seen
    )


def test_everything_is_escaped(tmp_path):
    page = write_run(
        tmp_path / "<b>run",
        [row(1)],
        samples=[{"step": 1, "prompt": EVIL, "text": EVIL}],
        data_report={EVIL: EVIL},
        environment={"device": EVIL},
        config=f"model: {json.dumps(EVIL)}\n",
    )
    reader = read(page)
    assert [tag for tag, _ in reader.seen].count("script") == 1
    assert not any(tag == "b" for tag, _ in reader.seen)
    assert reader.text.count("alert('x')") == 7
    assert "49" not in reader.text


@pytest.mark.parametrize(
    "rows",
    [[], [row(1)], [{"step": 1, "loss": None}], [row(5, loss=None, grad_norm=None)], [{"step": 3, "val_loss": 1.0}]],
)
def test_few_or_no_points(tmp_path, rows):
    page = write_run(tmp_path / "run", rows)
    read(page)
    assert "nan" not in page.lower().replace("nan)", "")
    assert ("No step was logged" in page) == (not titles(page))


def test_a_folder_with_nothing(tmp_path):
    assert "No step was logged" in write_report(tmp_path).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_hundred_thousand_steps_stay_small_and_quick(tmp_path):
    rows = [row(step, loss=3 + math.sin(step) + (100 if step == 54_321 else 0)) for step in range(1, 100_001)]
    started = time.process_time()
    page = write_run(tmp_path / "run", rows)
    assert time.process_time() - started < 20
    assert len(page) < 1_000_000
    assert "54,321|103" in page  # the one spike is there to hover


def test_steps_without_a_number_are_gaps():
    points = [(1, 1.0), (2, None), (3, 2.0), (4, 3.0), (5, None), (6, 1.0)]
    chart = build_chart("Loss", [Curve("training", points, "blue")])
    assert chart is not None
    path = chart.curves[0].path
    assert path.count("M") == 3 and path.count("L") == 1 and path.count("h0") == 2
    assert chart.note == "2 steps without a finite value are gaps"
    assert "training: 1 at step 1, 1 at step 6" in chart.summary
    assert build_chart("Loss", [Curve("training", [(1, None)], "blue")]) is None


def test_one_huge_value_does_not_flatten_the_rest():
    points = [(step, 1.0 + step % 3) for step in range(100)] + [(100, 1e9)]
    chart = build_chart("Loss", [Curve("training", points, "blue")])
    assert chart is not None and chart.is_cut and "highest: 1B" in chart.note
    assert max(top for _, top, _ in chart.curves[0].dots) > 60
    assert all(0 <= top <= 100 for _, top, _ in chart.curves[0].dots)


def test_smoothing_follows_without_lag():
    line = [(float(step), 2.0 * step) for step in range(200)]
    assert all(abs(value - 2.0 * step) < 4 for step, value in smooth(line) if value is not None)
    assert smooth([(1, None)]) == [(1, None)]
    assert smooth([(1, 2.0), (2, None), (3, 2.0)]) == [(1, 2.0), (2, None), (3, 2.0)]


def test_thinning_keeps_extremes_gaps_and_order():
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[5000], points[7777] = (5000, 99.0), (7777, None)
    kept = thin(points, 100)
    assert len(kept) <= 500 and kept == sorted(kept, key=lambda point: point[0])
    assert (5000, 99.0) in kept and (7777, None) in kept and kept[0] == points[0] and kept[-1] == points[-1]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.13, 0.29), (1e-5, 2e-5), (0, 123456), (-3, 5), (2, 2), (0, 0), (1e-30, 1e30)]
)
def test_ticks_span_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low and ticks[-1] >= high * (1 - 1e-9)
    assert len(set(map(format_number, ticks))) == len(ticks)


def test_numbers_read_well():
    values = [0, 2.34651, 0.00012, 2e-5, 1.5e-4, 999.9, 12345, 1.2e6, 4.1e8, 3e9, 5e13, 0.05, None]
    assert [format_number(value) for value in values] == [
        "0", "2.347", "1.2e-4", "2e-5", "1.5e-4", "999.9", "12,345", "1.2M", "410M", "3B", "50T", "0.05", "not finite",
    ]  # fmt: skip


def test_work_and_waiting_are_told(tmp_path):
    rows = [row(step, tflops_per_device=400.0, mfu=0.4045, data_seconds=0.025) for step in range(1, 4)]
    text = write_run(tmp_path / "run", rows)
    for told in (
        "Model FLOP/s of a device",
        "<dd>400</dd><small>TFLOP/s, MFU 40.5%</small>",  # no wider than a tile
        "Waiting for data",
        "5.0%",
        "of the time in steps",
    ):
        assert told in text, told
    assert "MFU" not in write_run(tmp_path / "other", [row(1, tflops_per_device=0.2)])
