"""Watches over the ranks of a run, so that one that hangs is told from those that wait for it.

A thread on each rank writes into torchrun's store, a few times in every timeout, in which step the rank is, where its
main thread stands, and whether it waits for others there. A rank that has waited too long compares what all wrote, says
which one hangs and where, and all end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import platform
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from tunesmith.errors import LostContact
from tunesmith.parallel.device import flight_record
from tunesmith.parallel.mesh import Mesh, connect_store
from tunesmith.training.launched import LAUNCHER_VARIABLE, REPORTED, is_first, notes_folder

FOLDER = "hang"
"""Of a run: stacks of all threads, and the flight recorder's traces."""

_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTED = str(Path(dist.__file__).parent)
_PYTHON = sysconfig.get_path("stdlib")
_DEPTH = 4


class Watchdog:
    """What this rank is at. `at` is cheap; the thread runs on several ranks only, and wherever a launcher could go away."""

    def __init__(self, mesh: Mesh, folder: Path, timeout_seconds: float):
        self.rank, self.world_size = mesh.rank, mesh.world_size
        self._folder, self._timeout, self._computes_behind = folder, timeout_seconds, mesh.device.type != "cpu"
        self._pause = min(5.0, max(0.1, timeout_seconds / 40))
        self._patience = max(2.5 * self._pause, 1.5)
        self._step, self._phase, self._count, self._beats = 0, "starting", 0, 0
        self._since = time.monotonic()
        self._main = threading.main_thread().ident
        self._held: FrameType | None = None
        self._held_since = 0.0
        self._dumped = False
        self._note = _note_file(self.rank)
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._has_waited, self._unanswered = False, 0
        self._launcher = os.environ.get(LAUNCHER_VARIABLE) == str(os.getppid())
        self._parent = os.getppid()
        self._store: Any = None
        self._attempt = "watch"
        self.at(0, "starting")
        if mesh.world_size > 1:
            self._attempt = mesh.ranks.from_main(lambda: f"watch-{os.getpid()}-{time.time_ns()}")
            self._store = PrefixStore(self._attempt, connect_store(max(5.0, 2 * self._pause), may_keep_it=False))
        if mesh.world_size > 1 or self._launcher:
            self._threads = [
                threading.Thread(target=run, daemon=True)
                for run in (self._watch, *([self._talk] if self._store else []))
            ]
            for thread in self._threads:
                thread.start()

    def at(self, step: int, phase: str) -> None:
        """Note that the rank is now in `phase` of `step`."""
        self._step, self._phase, self._since = step, phase, time.monotonic()
        self._count += 1
        if self._note is not None:  # the launcher reads it when the rank has died
            note = {"rank": self.rank, "host": platform.node(), "pid": os.getpid(), "at": _at(step, phase)}
            note["timeout"] = self._timeout
            os.pwrite(self._note, json.dumps(note).ljust(300).encode(), 0)

    def where(self) -> str:
        """'in step 3 (training)'."""
        return _at(self._step, self._phase)

    def close(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * self._pause)  # one that talks to a store that does not answer is left behind
        if self._note is not None:
            note, self._note = self._note, None
            os.close(note)
        self._held = None

    # --- the thread ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause):
            if self._launcher and os.getppid() != self._parent:
                os._exit(128 + signal.SIGTERM)  # nobody would know of this process any more
            if self._note is not None:
                os.utime(self._note)  # a sign of life for the launcher
            if self._store is None:
                continue
            self._has_waited = self._look()
            self._unanswered += 1  # counted, not timed: a machine that stood still for a while accuses nobody
            if self._has_waited and self._unanswered * self._pause > 2.5 * self._patience:
                seconds = time.monotonic() - self._since
                self._end(
                    f"{_keeper()}, which keeps what ranks tell each other, does not answer: it is stopped, or its machine is gone\n"
                    f"  rank {self.rank} has waited for {seconds:.0f} s {self.where()} at {self._place()}",
                    store_answers=False,
                )

    def _talk(self) -> None:
        """In a thread of its own: a store whose keeper is stopped lets one wait for ever."""
        while not self._stopped.wait(self._pause):
            with contextlib.suppress(RuntimeError):  # the store's keeper is gone
                self._beat(self._has_waited)
                self._unanswered = 0

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return place(frame) if frame is not None else "?"

    def _look(self) -> bool:
        """Whether the main thread has waited for others, in the very same call, for nearly as long as it may."""
        frame = self._waiting_frame()
        now = time.monotonic()
        if frame is None or frame is not self._held:
            # A frame that is held keeps its tensors: only where the rank has not moved for a while.
            self._held = frame if now - self._since > 2 * self._pause else None
            self._held_since = now
            return False
        early = (
            5.5 * self._pause + self._patience
        )  # it was there up to 3 pauses before it was seen; then notes are compared
        return now - self._held_since > self._timeout - early

    def _waiting_frame(self) -> FrameType | None:
        """The innermost frame of the thread that waits for other ranks; None where the rank computes, reads or sleeps."""
        frames = sys._current_frames()
        main = frames.get(self._main or 0)
        if main is None:
            return None
        if waits(main) or (self._computes_behind and self._phase == "training"):
            return main  # an accelerator's messages are waited for wherever the host next needs a number
        if main.f_code.co_filename.endswith("threading.py"):  # for a checkpoint that is written in the background
            own = {self._main, *(thread.ident for thread in self._threads)}
            return next((one for ident, one in frames.items() if ident not in own and waits(one)), None)
        return None

    def _beat(self, has_waited: bool) -> None:
        self._beats += 1
        state = {
            "host": platform.node(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "at": self.where(),
            "count": self._count,
            "seconds": time.monotonic() - self._since,
            "place": self._place(),
            "waits": self._waiting_frame() is not None,
            "beats": self._beats,
        }
        self._store.set(f"rank/{self.rank}", json.dumps(state))
        if self._store.check(["report"]):
            self._end(self._store.get("report").decode())
        if self._store.check(["alarm"]):
            self._dump()
        elif has_waited and self._store.compare_set("alarm", "", str(self.rank)) == str(self.rank).encode():
            self._dump()
            threading.Thread(target=self._find_out, name="watchdog-report", daemon=True).start()

    def _find_out(self) -> None:
        """Compare what all ranks write; say who hangs, where, and who waits for it."""
        first = self._states()
        time.sleep(self._patience)
        states = self._states()
        for rank, state in states.items():
            state["silent"] = state.get("beats") == first[rank].get("beats")
        self._store.set("report", report(states, self._folder / FOLDER))

    def _states(self) -> dict[int, dict[str, Any]]:
        store = self._store
        keys = {rank: f"rank/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(store.get(key)) if store.check([key]) else {} for rank, key in keys.items()}

    def _dump(self) -> None:
        """Leave the stacks of all threads in the run folder."""
        if self._dumped or not self._folder.is_dir():
            return
        self._dumped = True
        with contextlib.suppress(OSError):
            (self._folder / FOLDER).mkdir(exist_ok=True)
            with open(self._folder / FOLDER / f"rank-{self.rank}.txt", "w") as file:
                print(
                    f"rank {self.rank} ({platform.node()}, process {os.getpid()}) {self.where()}", file=file, flush=True
                )
                faulthandler.dump_traceback(file)
            if record := flight_record():
                (self._folder / FOLDER / f"rank-{self.rank}.flight").write_bytes(record)

    def _end(self, text: str, store_answers: bool = True) -> None:
        """Say it, once on every node and attempt, and end this process."""
        self._dump()
        if is_first(self._attempt):
            print(text, file=sys.stderr, flush=True)
            if store_answers:
                self._kill_the_silent()
        time.sleep(self._patience)  # the others read it too, also where this process keeps the store
        os._exit(REPORTED)

    def _kill_the_silent(self) -> None:
        """A process that is stopped would outlive SIGTERM: torchrun would wait half a minute for it."""
        with contextlib.suppress(RuntimeError, OSError):
            for state in self._states().values():
                if (
                    state.get("host") == platform.node()
                    and state.get("parent") == self._parent
                    and _state(state["pid"]) == "T"
                ):
                    is_first(f"end-of-{state['pid']}")  # the launcher need not tell of it
                    os.kill(state["pid"], signal.SIGKILL)


# --- what is said ------------------------------------------------------------------------------------


def report(states: dict[int, dict[str, Any]], folder: Path) -> str:
    """Which ranks hang, where, and where the others wait for them. `states`: {rank: what it wrote last}, empty for one that never did."""
    guilty = [rank for rank, state in states.items() if state.get("silent", True)]
    guilty = guilty or [rank for rank, state in states.items() if not state["waits"]]
    if not guilty and len({state["count"] for state in states.values()}) > 1:
        least = min(state["count"] for state in states.values())
        guilty = [rank for rank, state in states.items() if state["count"] == least]
    lines = [_accuse(rank, states[rank]) for rank in guilty] or ["all ranks wait for each other, at different places:"]
    waiting: dict[str, list[int]] = {}
    for rank, state in states.items():
        if rank not in guilty:
            waiting.setdefault(f"{state['at']} at {state['place']}", []).append(rank)
    for where, ranks in waiting.items():
        lines.append(f"  {_named(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {where}")
    lines.append(f"  the stacks of all threads are in {folder}")
    return "\n".join(lines)


def _accuse(rank: int, state: dict[str, Any]) -> str:
    if not state:
        return f"rank {rank} does not answer, and never did"
    who = f"rank {rank} ({state['host']}, process {state['pid']})"
    if not state["silent"]:
        return f"{who} has hung for {state['seconds']:.0f} s {state['at']} at {state['place']}"
    here = state["host"] == platform.node()
    status = _state(state["pid"]) if here else None
    why = (
        "it is stopped (SIGSTOP)"
        if status == "T"
        else "it has died"
        if here and status is None
        else "it is stopped, or its machine is gone"
    )
    return f"{who} does not answer ({why}); it was last seen {state['at']} at {state['place']}"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _at(step: int, phase: str) -> str:
    return f"in step {step} ({phase})" if step else f"before the first step ({phase})"


def place(frame: FrameType) -> str:
    """The innermost frames outside torch and Python's library, the innermost first: 'step.py:56 global_counts < step.py:67 train_step'."""
    names = []
    current: FrameType | None = frame
    while current is not None and len(names) < _DEPTH:
        code = current.f_code
        is_pythons = code.co_filename.startswith(_PYTHON) and "-packages" not in code.co_filename
        if not is_pythons and not code.co_filename.startswith((_TORCH, "<")):
            names.append(f"{Path(code.co_filename).name}:{current.f_lineno} {code.co_name}")
        current = current.f_back
    return " < ".join(names) or "?"


def waits(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks."""
    current: FrameType | None = frame
    while current is not None and current.f_code.co_filename.startswith(_TORCH):
        if current.f_code.co_filename.startswith(_DISTRIBUTED):
            return True
        current = current.f_back
    if current is not frame or current is None:
        return False
    lines = _lines(current.f_code.co_filename)
    number = current.f_lineno or 0  # None or 0 where a frame only begins
    line = lines[number - 1] if 0 < number <= len(lines) else ""
    return "dist." in line or ".wait()" in line  # straight into C++


@functools.cache
def _lines(file: str) -> list[str]:
    """Of a source file. linecache is not for several threads: one that fills it lets another fail with a KeyError."""
    try:
        return Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _state(pid: int) -> str | None:
    """A process's state as Linux names it (R, S, T …); None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def _keeper() -> str:
    """Who keeps the store that all ranks write to."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"torchrun at {place}" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else f"rank 0 at {place}"


def _note_file(rank: int) -> int | None:
    folder = notes_folder()
    return os.open(folder / f"rank-{rank}.json", os.O_CREAT | os.O_RDWR) if folder else None


# --- a rank that is gone -----------------------------------------------------------------------------

_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "connectFullMesh",
    "gloo/transport",
    "Timed out waiting",
)
_OWN_FAULT = ("out of memory", "CUDA error", "ncclInvalid", "ncclUnhandledCuda", "ncclInternal")


@contextlib.contextmanager
def noticing_lost_ranks(where: Any) -> Iterator[None]:
    """Errors of messages that could not be delivered become LostContact, which says `where()` this rank was; another rank is the cause."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        is_network = isinstance(error, dist.DistError) or any(part in text for part in _GONE)
        if not is_network or any(part in text for part in _OWN_FAULT):
            raise
        frames = [frame for frame, _ in _walk(error)]
        raise LostContact(
            f"rank {os.environ.get('RANK', 0)} ({platform.node()}, process {os.getpid()}) lost contact with another rank {where()} "
            f"at {place(frames[-1]) if frames else '?'}: {text.splitlines()[0][:200]}"
        ) from error


def _walk(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next
