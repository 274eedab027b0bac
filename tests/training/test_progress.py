"""The progress line in a terminal, in a pipe and under CI."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from tunesmith.training import progress as module
from tunesmith.training.progress import Progress, format_seconds


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def run_steps(clock, stream, steps, seconds, done=0):
    progress = Progress(steps, stream=stream, done=done)
    for step in range(done + 1, steps + 1):
        clock.now += seconds
        progress.update(step, {"loss": 1 / step, "tokens_per_second": 12345.6, "peak_memory_gib": 1.5})
    progress.close()
    return stream.getvalue()


def test_pipe_gets_few_plain_lines(clock):
    text = run_steps(clock, io.StringIO(), 1000, 0.01)
    lines = text.splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x1b]", text)
    assert lines[0].startswith("step 1/1000  loss 1.0000  12,346 tokens/s  1.50 GiB")
    assert lines[-1].startswith("step 1000/1000") and "took 10 s" in lines[-1]
    assert len(lines) == 21


def test_slow_runs_get_a_line_every_ten_seconds_then_every_minute(clock):
    assert len(run_steps(clock, io.StringIO(), 10_000, 0.1).splitlines()) == pytest.approx(60 + 7, abs=2)


@pytest.mark.parametrize("variable, value", [("CI", "true"), ("TERM", "dumb")])
def test_no_live_line_under_ci_or_in_a_dumb_terminal(clock, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert "\r" not in run_steps(clock, Terminal(), 10, 1.0)


def test_terminal_gets_one_line_redrawn(clock):
    text = run_steps(clock, Terminal(), 100, 0.5)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.count("\r") == 100
    drawn = text.split("\r")[-1]
    assert "━" * 30 in drawn and "loss 0.0100" in drawn
    assert "24 s left" in text.split("\r")[-50]


def test_redraws_are_limited(clock):
    assert run_steps(clock, Terminal(), 1000, 0.001).count("\r") < 15


@pytest.mark.parametrize("width", [12, 20, 30, 45, 60, 80, 200])
def test_the_line_fits_the_terminal(clock, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for drawn in run_steps(clock, Terminal(), 30, 1.0).split("\r")[1:]:
        visible = re.sub(r"\x1b\[[0-9;]*[mK]", "", drawn).rstrip("\n")
        assert len(visible) < width
        assert visible.startswith("step ")
        assert "left" in visible or "took" in visible or width < 30 or visible.startswith("step 1/")


def test_no_color(clock, monkeypatch):
    assert "\x1b[36m" in run_steps(clock, Terminal(), 3, 1.0)
    monkeypatch.setenv("NO_COLOR", "1")
    text = run_steps(clock, Terminal(), 3, 1.0)
    assert set(re.findall(r"\x1b\[[0-9;]*[a-zA-Z]", text)) == {"\x1b[K"}


def test_a_terminal_without_unicode_gets_ascii(clock):
    stream = Terminal()
    stream.encoding = "ascii"
    run_steps(clock, stream, 3, 1.0)
    assert stream.getvalue().isascii()


def test_note_does_not_break_the_line(clock):
    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.note("before")
    progress.update(1, {"loss": 1.0})
    progress.note("saved")
    progress.close()
    assert stream.getvalue().startswith("before\n\rstep 1/10")
    assert "\r\x1b[Ksaved\n\rstep 1/10" in stream.getvalue()


def test_notes_in_a_pipe_are_lines(clock):
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    clock.now += 1
    progress.update(1, {"loss": float("nan")})
    progress.note("saved")
    progress.close()
    assert stream.getvalue().splitlines() == ["step 1/10  loss nan  9.0 s left", "saved"]


def test_time_left_counts_only_this_run_and_not_its_first_step(clock):
    progress = Progress(110, stream=io.StringIO(), done=50)
    clock.now += 500  # compiling
    progress.update(51)
    for step in range(52, 61):
        clock.now += 2
        progress.update(step)
    assert progress._time_left() == "1:40 left"


def test_unknown_length_and_no_stats(clock):
    stream = io.StringIO()
    progress = Progress(None, stream=stream)
    progress.update(1)
    clock.now += 11
    progress.update(2, {"loss": 2.0})
    progress.update(3)
    progress.close()
    progress.close()
    assert stream.getvalue().splitlines() == ["step 1", "step 2  loss 2.0000", "step 3  loss 2.0000"]


def test_other_ranks_are_silent(clock):
    stream = io.StringIO()
    progress = Progress(1, enabled=False, stream=stream)
    progress.update(1, {"loss": 1.0})
    progress.note("x")
    progress.close()
    assert stream.getvalue() == ""


def test_a_real_terminal(tmp_path):
    code = "from tunesmith.training.progress import Progress\np = Progress(2)\np.update(1, {'loss': 3.0})\np.note('hello')\np.update(2, {'loss': 2.0})\np.close()"
    main, other = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS")} | {
        "TERM": "xterm",
        "LC_ALL": "C.UTF-8",
    }
    subprocess.run([sys.executable, "-c", code], stdout=other, env=environment, check=True)
    os.close(other)
    text = os.read(main, 10_000).decode()
    os.close(main)
    assert "\rstep 1/2" in text and "hello\r\n" in text and text.endswith("\n")


def test_durations():
    assert [format_seconds(s) for s in (1.23, 59, 187, 3723, 183_845)] == [
        "1.2 s",
        "59 s",
        "3:07",
        "1:02:03",
        "2 d 3 h",
    ]


def test_a_reader_that_goes_away_does_not_end_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        progress = Progress(3, stream=stream)
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0})
            progress.note("a line")
        progress.close()


def test_work_is_shown_where_it_says_something(clock):
    stream = io.StringIO()
    progress = Progress(2, stream=stream)
    progress.update(1, {"loss": 1.0, "tflops_per_device": 0.002})
    progress.update(2, {"tflops_per_device": 412.3, "mfu": 0.4169})
    first, second = stream.getvalue().splitlines()
    assert "FLOP" not in first and "412 TFLOP/s  MFU 41.7%" in second
