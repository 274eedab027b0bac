"""Starts several processes through torchrun's launcher and says once how they ended; imports torch."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tunesmith.cli import torchrun
from tunesmith.errors import UserError
from tunesmith.training.launched import LAUNCHER_VARIABLE, LOST_CONTACT, NOTES_VARIABLE, REPORTED

CONFIG_VARIABLE = "TUNESMITH_CONFIG"
"""Environment variable that hands the resolved config to the workers; a restarted worker reads the same one."""
SHUTDOWN_SECONDS = 600
"""How long workers that were asked to end may take to save."""
FAILED_SECONDS = 30
"""How long they may take where another one failed, as torchrun has it where it finds out itself: nothing is left to save, and who is
blocked in a device's call never sees a signal."""


def launch_workers(options: list[str], config: str) -> int:
    """Run the recipe on the processes that torchrun's `options` ask for; returns the exit code of the run."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of sockets that are tried again; read at import
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import run

    arguments = _arguments(options)
    with tempfile.TemporaryDirectory(prefix="tune-") as notes:
        os.environ |= {CONFIG_VARIABLE: config, NOTES_VARIABLE: notes, LAUNCHER_VARIABLE: str(os.getpid())}
        deaths = _Deaths(Path(notes))
        threading.Thread(target=_end_the_lifeless, args=(Path(notes),), daemon=True).start()
        _take_over_signals(arguments, Path(notes))
        try:
            run(arguments)
        except ChildFailedError as error:
            return _report(error, deaths)
        except Exception as error:
            if (ended := _in_chain(error, SignalException)) is not None:
                return _end_on_purpose(Path(notes)) or 128 + int(ended.sigval)
            if not isinstance(error, (RendezvousError, DistError)):
                raise
            print(_no_meeting(arguments, error), file=sys.stderr)
            return 1
    return 0


# --- before ------------------------------------------------------------------------------------------


def _arguments(options: list[str]) -> Any:
    """torchrun's own reading of `options`. Raises UserError for values that it refuses."""
    from torch.distributed.run import config_from_args, determine_local_world_size, parse_args

    arguments = parse_args([*options, "-m", "tunesmith.cli.worker"])
    if not _names_a_meeting_place(options):
        arguments.standalone = True  # a free port, so that two runs on one machine don't meet
    elif arguments.rdzv_backend != "static":
        # With a store that the agents share, a node that joins later looks in vain for its address (torch 2.13), and one that
        # stays keeps the address of a first node that is gone. So rank 0 keeps a new one at every start.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if torchrun.value(options, "--shutdown_timeout") is None:
        arguments.shutdown_timeout = SHUTDOWN_SECONDS
    try:
        processes = determine_local_world_size(arguments.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        config_from_args(arguments)
    except (ValueError, AssertionError) as error:
        raise UserError(f"torchrun's options {' '.join(options)}: {error}") from error
    return arguments


def _names_a_meeting_place(options: list[str]) -> bool:
    if torchrun.value(options, "--nnodes") not in (None, "1", "1:1"):
        return True
    names = ("--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--rdzv_conf", "--master_addr", "--master_port")
    return any(torchrun.value(options, name) is not None for name in (*names, "--node_rank"))


def _take_over_signals(arguments: Any, notes: Path) -> None:
    """Let one signal end the run, whoever it came to: torchrun would drop workers that still save when a second one comes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    numbers = [getattr(signal, name.strip()) for name in arguments.signals_to_handle.split(",")]
    arguments.signals_to_handle = "SIGUSR2"  # torchrun sets handlers for these anew at every start of workers
    first: list[int] = []

    def handle(number: int, frame: Any) -> None:
        repeated, from_worker = number in first, number == signal.SIGUSR1
        if from_worker and first:
            return
        first.append(number)
        if from_worker and (_ending(notes) or {}).get("code") not in (130, 143):  # those were asked to end, and saved
            late = threading.Timer(FAILED_SECONDS, _kill_workers, (notes,))
            late.daemon = True
            late.start()
        if repeated or len(first) == 1:  # once more: workers see that this process is gone, and end at once
            death = signal.SIGTERM if from_worker else signal.Signals(number)
            raise SignalException(f"ended by {signal.Signals(number).name}", death)

    for number in (*numbers, signal.SIGUSR1):
        signal.signal(number, handle)


def _no_meeting(arguments: Any, error: Exception) -> str:
    place = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
    return (
        f"the nodes did not come together at {place}, or the one that is there has gone ({str(error).splitlines()[0]}): start the same "
        f"`tune run` on each of the {arguments.nnodes} nodes, with the same --rdzv_id and an --rdzv_endpoint that all of them can reach"
    )


# --- after -------------------------------------------------------------------------------------------


class _Deaths(logging.Handler):
    """Takes the place of torchrun's log: tells of a dead worker at once, also where it is started again. Silent else, unless LOGLEVEL is set."""

    def __init__(self, notes: Path):
        super().__init__()
        self.told: set[int] = set()
        self._notes = notes
        if "LOGLEVEL" not in os.environ:
            logger = logging.getLogger("torch.distributed.elastic")
            logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("failed (exitcode") and isinstance(record.args, tuple):
            exit_code, _, pid, *_ = record.args
            # By SIGTERM it is torchrun that ends those which outlive another; one that came from outside is told by _report.
            if isinstance(exit_code, int) and isinstance(pid, int) and exit_code < 0 and exit_code != -signal.SIGTERM:
                self.tell(exit_code, pid)

    def tell(self, exit_code: int, pid: int) -> bool:
        """Say once which rank ended how, and in which step. False where a worker put an end to it and told why."""
        if (self._notes / f"said-end-of-{pid}").exists():
            return False
        if pid not in self.told:
            self.told.add(pid)
            killed = exit_code < 0
            how = f"was killed by {signal.Signals(-exit_code).name}" if killed else f"ended with exit code {exit_code}"
            hint = "" if killed else "; its own output above says why"
            print(f"{_who(self._notes, pid)} {how}{hint}", file=sys.stderr, flush=True)
        return True


_GRACE = 2.0
"""Seconds beyond a worker's timeout before the launcher ends it: other ranks, which know more, speak first."""


def _end_the_lifeless(notes: Path) -> None:
    """Kill workers that gave no sign of life for their timeout: stopped ones, which the others would wait for, or torchrun for ever."""
    while notes.is_dir():
        time.sleep(1)
        for file in notes.glob("rank-*.json"):
            try:
                note, silence = json.loads(file.read_text()), time.time() - file.stat().st_mtime
                if silence > note["timeout"] + _GRACE and _is_own(note["pid"]):
                    print(
                        f"rank {note['rank']} ({note['host']}, process {note['pid']}) {note['at']} gave no sign of life for "
                        f"{silence:.0f} s: it is stopped, or stuck in a call that lets nothing else run; it is ended",
                        file=sys.stderr,
                        flush=True,
                    )
                    (notes / f"said-end-of-{note['pid']}").touch()
                    os.kill(note["pid"], signal.SIGKILL)
            except (OSError, ValueError, KeyError):  # it is just being written, or gone
                continue


def _kill_workers(notes: Path) -> None:
    """Those that are left of this node, so that nobody waits for them."""
    for file in notes.glob("rank-*.json"):
        try:
            pid = json.loads(file.read_text())["pid"]
            if _is_own(pid):
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError, KeyError):  # it is just being written, or gone
            continue


def _is_own(pid: int) -> bool:
    """Whether a process is alive and a child of this one."""
    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return status[0] != "Z" and status[1] == str(os.getpid())


def _who(notes: Path, pid: int) -> str:
    """'rank 1 (host, process 123) in step 7 (training)', as far as it left a note."""
    for file in notes.glob("rank-*.json"):
        try:
            note = json.loads(file.read_text())
        except ValueError:  # killed while it wrote
            continue
        if note["pid"] == pid:
            return f"rank {note['rank']} ({note['host']}, process {pid}) {note['at']}"
    return f"a worker (process {pid})"


def _in_chain(error: BaseException | None, kind: type[Any]) -> Any:
    """The exception of `kind` that led to `error`, or None. A signal may come in the few instructions of torchrun's timers in which
    another exception takes the place of the one that our handler raises (torch 2.13)."""
    chain, seen = [error], set()
    while chain:
        one = chain.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, kind):
            return one
        seen.add(id(one))
        chain += [one.__cause__, one.__context__]
    return None


def _cause(failures: dict[int, Any]) -> tuple[int, Any]:
    """(rank, failure) of the process that failed first: the launcher ends the others by SIGTERM, often within the same second."""
    for rank, failure in failures.items():
        if failure.exitcode == REPORTED:
            return rank, failure
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode not in ended} or failures
    own = {rank: failure for rank, failure in own.items() if failure.exitcode != LOST_CONTACT} or own
    return min(own.items(), key=lambda item: item[1].timestamp)


def _end_on_purpose(notes: Path) -> int | None:
    """The exit code that a worker asked for, after saying why; None where none did."""
    if (ended := _ending(notes)) is None:
        return None
    if ended["message"]:
        print(ended["message"], file=sys.stderr)
    return ended["code"]


def _ending(notes: Path) -> dict[str, Any] | None:
    """{code, message} of the worker that ended the run; None where none did."""
    try:
        return json.loads((notes / "ended.json").read_text())
    except (OSError, ValueError):
        return None


def _report(error: Any, deaths: _Deaths) -> int:
    """Say once why the run failed, and choose the exit code."""
    _, failure = _cause(error.failures)
    if failure.exitcode == 2:  # the user's mistake: the worker left the sentence, every rank the same one
        print(failure.message, file=sys.stderr)
        return 2
    if failure.exitcode in (130, 143):
        return failure.exitcode
    if failure.exitcode in (LOST_CONTACT, REPORTED):
        if failure.exitcode == LOST_CONTACT:
            print(failure.message, file=sys.stderr)
        return 1
    if not deaths.tell(failure.exitcode, failure.pid):
        return 1
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
