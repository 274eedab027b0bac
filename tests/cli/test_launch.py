"""Runs on several processes that come to grief: killed, hung, interrupted, with a node lost. Nothing is lost, and it is said once."""

import json
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest
from distributed import run_distributed

TWO = ["--nproc_per_node", "2"]
GO_ON = "go on with the same command and resume_from_checkpoint=true"


def _never_stopped(words: list[str]) -> None:
    from tunesmith.config import load_config, run

    run(load_config("sft", *words[1:]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, chat_file) -> Path:
    """The folder of a run on two ranks that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_distributed(_never_stopped, 2, launching.words(folder, tiny_model, chat_file))
    return folder / "run"


def test_a_killed_worker_is_started_again_and_nothing_is_lost_or_repeated(tmp_path, tiny_model, chat_file, whole):
    words = launching.words(tmp_path, tiny_model, chat_file)
    code, output, errors = launching.tune([*TWO, "--max_restarts", "1"], words, tmp_path, "kill:1:4")
    assert code == 0, errors
    assert len(re.findall(r"rank 1 \(\S+, process \d+\) in step 4 \(beginning\) was killed by SIGKILL\n", errors)) == 1
    assert "Traceback" not in errors and output.count("resumed after step 2") == 1
    assert launching.metrics(tmp_path / "run") == launching.metrics(whole)
    assert launching.weights(tmp_path / "run") == launching.weights(whole)


@pytest.mark.slow
def test_sigterm_saves_on_all_ranks_and_says_so_once(tmp_path, tiny_model, chat_file, whole):
    words = launching.words(tmp_path, tiny_model, chat_file)
    code, output, errors = launching.tune([*TWO, "--max_restarts", "1"], words, tmp_path, "SIGTERM:0:3")
    assert code == 143, errors
    assert errors.count("stopped and saved after step 3") == errors.count(GO_ON) == 1
    assert output.count("asked to end") == 1 and len(errors.splitlines()) == 3
    assert launching.metrics(tmp_path / "run") == launching.metrics(whole)[:3]
    resumed = launching.words(tmp_path, tiny_model, chat_file, "resume_from_checkpoint=true")
    run_distributed(_never_stopped, 2, resumed)
    assert launching.weights(tmp_path / "run") == launching.weights(whole)


def test_a_rank_that_hangs_is_told_from_one_that_waits(tmp_path, tiny_model, chat_file):
    words = launching.words(tmp_path, tiny_model, chat_file, "dist_timeout_seconds=12")
    code, _, errors = launching.tune(TWO, words, tmp_path, "sleep:1:4")
    assert code == 1 and len(errors.splitlines()) == 3, errors
    guilty, waiting, stacks = errors.splitlines()
    assert re.match(
        r"rank 1 \(\S+, process \d+\) has hung for \d+ s in step 4 \(beginning\) at own.py:\d+ sleep_for_ever < ",
        guilty,
    )
    assert re.match(r"  rank 0 waits in step 4 \(training\) at mesh.py:\d+ _reduce < ", waiting)
    assert stacks.endswith(str(tmp_path / "run" / "hang"))
    assert "sleep_for_ever" in (tmp_path / "run" / "hang" / "rank-1.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped(tmp_path, tiny_model, chat_file, rank):
    words = launching.words(tmp_path, tiny_model, chat_file, "dist_timeout_seconds=12")
    code, _, errors = launching.tune(TWO, words, tmp_path, f"stop:{rank}:4")
    assert code == 1 and f"rank {rank} (" in errors and "stopped" in errors and f"rank {1 - rank} waits" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_bug_on_one_rank_keeps_its_traceback_alone(tmp_path, tiny_model, chat_file):
    code, output, errors = launching.tune(TWO, launching.words(tmp_path, tiny_model, chat_file), tmp_path, "fail:1:4")
    assert code == 1 and errors.count("Traceback") == 1 and "ZeroDivisionError: a bug" in errors
    assert errors.splitlines()[-1].startswith("rank 1 (") and errors.endswith("its own output above says why\n")
    assert "asked to end" not in output


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(tmp_path, tiny_model, chat_file):
    words = launching.words(tmp_path, tiny_model, chat_file, "tokenizer.max_seq_len=2")
    code, output, errors = launching.tune([*TWO, "--max_restarts", "3"], words, tmp_path)
    assert code == 2 and len(errors.splitlines()) == 1, errors


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path, tiny_model, chat_file):
    """It reaches the launcher alone, which hands it on; all is saved."""
    words = launching.words(tmp_path, tiny_model, chat_file, "max_steps=200", "epochs=100")
    command = [sys.executable, "-m", "tunesmith", "run", *TWO, *words]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(command[0], command, {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"})
    said = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(terminal, 4096):
                said.extend(chunk)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        launching.wait_for(lambda: b"step 1/200" in said)
        os.write(terminal, b"\x03")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
        reader.join()
    os.close(terminal)
    text = said.decode()
    assert os.waitstatus_to_exitcode(status) == 130, text
    assert text.count("interrupted") == text.count("stopped and saved") == text.count(GO_ON) == 1
    assert "Traceback" not in text and "closing signal" not in text


# --- two nodes ---------------------------------------------------------------------------------------


def _port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _nodes(kind: str, restarts: int = 3) -> list[list[str]]:
    """Options of two agents on this machine that stand for two nodes."""
    port, common = _port(), ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", str(restarts)]
    if kind == "static":
        place = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        return [[*common, *place, "--node_rank", str(node)] for node in range(2)]
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "job7"]
    return [[*common, *place]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c10d", "static"])
def test_a_killed_worker_of_two_nodes(tmp_path, tiny_model, chat_file, whole, kind):
    words = launching.words(tmp_path, tiny_model, chat_file)
    agents = [launching.start(options, words, tmp_path, "kill:1:4") for options in _nodes(kind)]
    ends = [launching.finish(agent) for agent in agents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert launching.metrics(tmp_path / "run") == launching.metrics(whole)
    assert launching.weights(tmp_path / "run") == launching.weights(whole)


@pytest.mark.slow
def test_a_node_lost_and_brought_back(tmp_path, tiny_model, chat_file, whole):
    """Agent and worker are killed. The new agent counts restarts from 0, and finds a folder that is not empty."""
    words, (host, guest) = launching.words(tmp_path, tiny_model, chat_file), _nodes("c10d")
    first = launching.start(host, words, tmp_path, "wait:1:4")
    launching.wait_for(lambda: _listens(host))  # so that rank 0 is the first agent's
    second = launching.start(guest, words, tmp_path, "wait:1:4")
    launching.wait_for((tmp_path / "run.trouble").exists)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(second.pid)], capture_output=True, text=True).stdout
    for pid in (second.pid, *map(int, children.split())):
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    time.sleep(3)
    second = launching.start(guest, words, tmp_path)
    ends = [launching.finish(agent) for agent in (first, second)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sum(output.count("resumed after step 2") for _, output, _ in ends) == 1
    assert launching.metrics(tmp_path / "run") == launching.metrics(whole)
    assert launching.weights(tmp_path / "run") == launching.weights(whole)


def _listens(options: list[str]) -> bool:
    port = int(options[options.index("--rdzv_endpoint") + 1].rpartition(":")[2])
    with socket.socket() as opened:
        return opened.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_signal_on_one_node_ends_both(tmp_path, tiny_model, chat_file):
    """Though they may restart: a wanted end is no failure."""
    words = launching.words(tmp_path, tiny_model, chat_file)
    agents = [launching.start(options, words, tmp_path, "SIGTERM:1:3") for options in _nodes("c10d")]
    ends = [launching.finish(agent) for agent in agents]
    assert [code for code, _, _ in ends] == [143, 143], ends
    assert sum(errors.count(GO_ON) for _, _, errors in ends) == 1


# --- the parts ---------------------------------------------------------------------------------------


def test_ranks_meet_though_the_store_is_full_of_old_words():
    from torch.distributed import TCPStore

    from tunesmith.parallel.mesh import fresh_store

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in (1, 2):
        server.set(f"here/{rank}", "a word of a process that is dead")
    met: dict[int, str] = {}

    def join(rank: int) -> None:
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        own = fresh_store(store, rank, 3)
        own.set(f"{rank}", str(rank))
        met[rank] = b"".join(own.get(str(other)) for other in range(3)).decode()

    for _ in range(2):  # and again, over the words of the first attempt
        threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert met == {rank: "012" for rank in range(3)}
        met.clear()


def _state(count: int, waits: bool, silent: bool = False) -> dict:
    return {"host": "far", "pid": 1, "at": f"in step {count}", "count": count, "seconds": 60.0, "place": f"p{count}", "waits": waits, "silent": silent}  # fmt: skip


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([_state(7, True), _state(7, False)], "rank 1 (far, process 1) has hung for 60 s in step 7 at p7\n  rank 0 waits in step 7"),
        ([_state(7, True), _state(7, True, True)], "rank 1 (far, process 1) does not answer (it is stopped, or its machine is gone)"),
        ([_state(7, True), _state(6, True), _state(7, True)], "rank 1 (far, process 1) has hung for 60 s in step 6 at p6\n  ranks 0, 2 wait"),
        ([_state(7, True), _state(7, True)], "all ranks wait for each other"),
        ([_state(7, True), {}], "rank 1 does not answer, and never did"),
    ],
)  # fmt: skip
def test_who_is_guilty(states, said):
    from tunesmith.training.watchdog import report

    assert report(dict(enumerate(states)), Path("run/hang")).startswith(said)


def test_a_place_leaves_out_what_lies_in_pythons_library():
    from tunesmith.training.watchdog import place

    waiting: Future = Future()
    thread = threading.Thread(target=waiting.result)
    thread.start()
    try:
        launching.wait_for(lambda: "wait" in sys._current_frames()[thread.ident].f_code.co_name)
        assert place(sys._current_frames()[thread.ident]) == "?"
        own = threading.Thread(target=lambda: waiting.result())
        own.start()
        launching.wait_for(lambda: "wait" in sys._current_frames()[own.ident].f_code.co_name)
        assert re.fullmatch(r"test_launch\.py:\d+ <lambda>", place(sys._current_frames()[own.ident]))
    finally:
        waiting.set_result(None)


@pytest.mark.parametrize(("death", "lines"), [(signal.SIGKILL, 1), (signal.SIGTERM, 0)])
def test_of_workers_that_the_launcher_ends_nothing_is_told(tmp_path, monkeypatch, capsys, death, lines):
    from tunesmith.cli.launch import _Deaths

    monkeypatch.setenv("LOGLEVEL", "ERROR")  # leaves torchrun's logger alone
    message, of = "failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s", (-death, 0, 12, "python")
    _Deaths(tmp_path).emit(logging.LogRecord("torch", logging.ERROR, "", 0, message, of, None))
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(("code", "is_killed"), [(2, True), (143, False)])
def test_a_worker_that_is_deaf_to_signals_is_not_waited_for_once_another_failed(tmp_path, monkeypatch, code, is_killed):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from tunesmith.cli import launch

    monkeypatch.setattr(launch, "FAILED_SECONDS", 0.1)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    (tmp_path / "ended.json").write_text(json.dumps({"code": code, "message": "a mistake"}))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as deaf:
        (tmp_path / "rank-0.json").write_text(json.dumps({"pid": deaf.pid}))
        try:
            launch._take_over_signals(SimpleNamespace(signals_to_handle="SIGUSR2"), tmp_path)
            with pytest.raises(SignalException):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(1)
            if is_killed:
                assert deaf.wait(10) == -signal.SIGKILL
            else:
                time.sleep(0.5)
                assert deaf.poll() is None
        finally:
            deaf.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


AS_THE_TIMER_STARTS = """
import os, signal, sys
from types import SimpleNamespace
import torch.distributed.run
from torch.distributed.elastic.metrics import api
from tunesmith.cli.launch import launch_workers

api.time = SimpleNamespace(time=lambda: os.kill(os.getpid(), signal.SIGTERM))
torch.distributed.run.run = api.prof(print)
sys.exit(launch_workers(["--nproc_per_node", "2"], "{}"))
"""


def test_a_signal_that_comes_as_torchruns_timer_starts_ends_the_run_as_any_other():
    """There, another exception takes the place of the handler's."""
    ended = subprocess.run([sys.executable, "-c", AS_THE_TIMER_STARTS], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (143, "")


@pytest.mark.parametrize(
    ("options", "processes"),
    [("--nproc_per_node 2", 2), ("--nnodes 4 --nproc-per-node=8", 32), ("--nnodes 2:2 --nproc_per_node 2", 4), ("--nnodes 1:4 --nproc_per_node 2", 0), ("--nproc_per_node gpu", 0)],
)  # fmt: skip
def test_how_many_processes_there_will_be(options, processes):
    from tunesmith.cli import torchrun

    assert torchrun.processes(options.split()) == processes


def test_options_that_torchrun_refuses_are_a_mistake(tmp_path, tiny_model, chat_file):
    words = launching.words(tmp_path, tiny_model, chat_file)
    code, _, errors = launching.tune(["--nproc_per_node", "two"], words, tmp_path)
    assert code == 2 and errors.count("\n") == 1 and "two" in errors
