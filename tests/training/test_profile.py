"""Traces of a few steps."""

import gzip
import json

import torch

from tunesmith.configs.shared import Profiler
from tunesmith.training.profile import profiler


def run_steps(config, folder, count):
    with profiler(config, folder) as trace:
        for _ in range(count):
            torch.ones(64, 64) @ torch.ones(64, 64)
            trace.step()


def test_traces_of_every_cycle(tmp_path):
    run_steps(
        Profiler(enabled=True, wait_steps=1, warmup_steps=1, active_steps=2, num_cycles=2, profile_memory=True),
        tmp_path,
        10,
    )
    traces = sorted((tmp_path / "profile").glob("trace-rank0-step*.json.gz"))
    assert len(traces) == 2
    for trace in traces:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert sum(event["name"] == "aten::mm" for event in events) == 2
        assert (
            sum(event["name"].startswith("ProfilerStep") and event.get("cat") == "user_annotation" for event in events)
            == 2
        )
    assert len(list((tmp_path / "profile").glob("operators-*.txt"))) == 2
    assert "aten::mm" in next((tmp_path / "profile").glob("operators-*.txt")).read_text()


def test_a_run_shorter_than_a_cycle_writes_nothing_broken(tmp_path):
    run_steps(Profiler(enabled=True, wait_steps=1, warmup_steps=1, active_steps=5), tmp_path, 3)
    for trace in (tmp_path / "profile").glob("*.gz"):
        json.loads(gzip.decompress(trace.read_bytes()))


def test_disabled_leaves_no_trace(tmp_path):
    run_steps(Profiler(), tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
