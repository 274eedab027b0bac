"""Traces of a few steps."""

import gzip
import json

import pytest
import torch

from tunesmith.configs.profile import Profiler
from tunesmith.parallel import device as accelerator
from tunesmith.training.profile import MemorySnapshots, profiler


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


def test_chosen_ranks_alone_record(tmp_path):
    config = Profiler(enabled=True, wait_steps=0, warmup_steps=1, active_steps=1, ranks=[1])
    for rank in range(3):
        with profiler(config, tmp_path, rank) as trace:
            for _ in range(2):
                trace.step()
    assert [path.name for path in (tmp_path / "profile").glob("trace-*")] == ["trace-rank1-step000002.json.gz"]


class FakeMemory:
    """The calls of an accelerator that keeps a history of its memory."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(accelerator, "start_memory_history", lambda device: self.calls.append("start") or True)
        monkeypatch.setattr(accelerator, "stop_memory_history", lambda: self.calls.append("stop"))
        monkeypatch.setattr(accelerator, "write_memory_snapshot", lambda path: path.write_text("snapshot"))


def test_memory_snapshots_every_n_steps_and_when_memory_runs_out(tmp_path, monkeypatch, capsys):
    memory = FakeMemory(monkeypatch)
    config = Profiler(memory_snapshot_every_n_steps=2)
    with pytest.raises(torch.OutOfMemoryError):
        with MemorySnapshots(config, tmp_path, 3, torch.device("cuda")) as snapshots:
            for step in range(1, 6):
                snapshots.step(step)
            raise torch.OutOfMemoryError("full")
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["memory-rank3-oom.pickle", "memory-rank3-step000002.pickle", "memory-rank3-step000004.pickle"]
    assert memory.calls == ["start", "stop"]
    assert "rank 3 ran out of memory" in capsys.readouterr().err


def test_no_snapshots_of_other_ranks_nor_of_a_cpu(tmp_path, monkeypatch):
    for config, rank in ((Profiler(memory_snapshot_every_n_steps=1), 0), (Profiler(), 0)):
        with MemorySnapshots(config, tmp_path, rank, torch.device("cpu")) as snapshots:
            snapshots.step(1)
    memory = FakeMemory(monkeypatch)
    with MemorySnapshots(
        Profiler(memory_snapshot_every_n_steps=1, ranks=[0]), tmp_path, 1, torch.device("cuda")
    ) as other:
        other.step(1)
    assert list(tmp_path.iterdir()) == [] and memory.calls == []
