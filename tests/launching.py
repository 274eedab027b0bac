"""`tune run` on several processes, for tests: a recipe that comes to grief where it is told to, and what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RECIPE = '''
"""SFT, but a rank does something at a step of the first attempt: TROUBLE="what:rank:step"."""
import os, signal, sys, time
from pathlib import Path

from tunesmith.configs.sft import SFT
from tunesmith.recipes import sft
from tunesmith.training.run import Run


def main(config: SFT):
    trouble = os.environ.get("TROUBLE", "")
    what, rank, at = (trouble or "nothing:0:0").split(":")
    begin = Run.next

    def next_with_trouble(self, read, step):
        is_time = step == int(at) and os.environ["RANK"] == rank
        mark = Path(config.output_dir + ".trouble")
        if is_time and not mark.exists():
            mark.touch()
            act(what)
        return begin(self, read, step)

    Run.next = next_with_trouble
    sft.main(config)


def act(what):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "sleep":
        sleep_for_ever()
    elif what == "fail":
        raise ZeroDivisionError("a bug")
    elif what == "wait":  # for the test to act
        time.sleep(2)
    elif what.startswith("SIG"):
        os.kill(os.getppid(), getattr(signal, what))
        time.sleep(1)
    elif what.startswith("own"):
        os.kill(os.getpid(), getattr(signal, what[3:]))


def sleep_for_ever():
    while True:
        time.sleep(1000)
'''


def words(tmp_path: Path, model: Path, data: Path, *more: str, name: str = "run") -> list[str]:
    """The recipe and its settings: six short steps, a checkpoint after every second one."""
    (tmp_path / "own.py").write_text(RECIPE)
    settings = [f"model={model}", f"dataset.source={data}", "dtype=fp32", "tokenizer.max_seq_len=64", "max_steps=6"]
    return ["own.py", *settings, "save_every_n_steps=2", f"output_dir={tmp_path / name}", *more]


def start(options: list[str], words: list[str], cwd: Path, trouble: str = "", **environment: str) -> subprocess.Popen:
    """Begin `tune run OPTIONS… WORDS…`."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TROUBLE": trouble, **environment}
    command = [sys.executable, "-m", "tunesmith", "run", *options, *words]
    return subprocess.Popen(
        command, cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; TimeoutError with what it said for a run that hangs."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise TimeoutError(f"the run did not end within {seconds} s:\n{output}\n{errors}") from None
    return process.returncode, output, errors


def tune(options: list[str], words: list[str], cwd: Path, trouble: str = "", **environment: str):
    return finish(start(options, words, cwd, trouble, **environment))


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def metrics(folder: Path) -> list[dict]:
    """What was logged, but for time, throughput and memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    varying = ("second", "memory", "gib", "data_", "flops", "mfu")
    return [{key: value for key, value in row.items() if not any(part in key for part in varying)} for row in rows]


def weights(folder: Path) -> bytes:
    """Of the last checkpoint."""
    newest = (folder / "checkpoints" / "latest").read_text().strip()
    return b"".join(file.read_bytes() for file in sorted((folder / "checkpoints" / newest).glob("*.safetensors")))
