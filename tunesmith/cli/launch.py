"""Starts several processes through torchrun's launcher; imports torch."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any

CONFIG_VARIABLE = "TUNESMITH_CONFIG"
"""Environment variable that hands the resolved config to the workers; a restarted worker reads the same one."""


def launch_workers(options: list[str], config: str) -> int:
    """Run the recipe on the processes that torchrun's `options` ask for; returns the exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    arguments = parse_args([*options, "-m", "tunesmith.cli.worker"])
    if not any(_names_a_meeting_place(option) for option in options):
        arguments.standalone = True  # a free port, so that two runs on one machine don't meet
    os.environ[CONFIG_VARIABLE] = config
    if "OMP_NUM_THREADS" not in os.environ:
        processes = determine_local_world_size(arguments.nproc_per_node)
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(arguments)
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _names_a_meeting_place(option: str) -> bool:
    name = option.replace("-", "_").lstrip("_")
    return name.startswith(("nnodes", "rdzv", "master", "node_rank", "standalone"))


def _cause(failures: dict[int, Any]) -> tuple[int, Any]:
    """(rank, failure) of the process that failed first: the launcher ends the others by SIGTERM, often within the same second."""
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode not in ended} or failures
    return min(own.items(), key=lambda item: item[1].timestamp)


def _report(error) -> int:
    """Say once why the run failed, and choose the exit code."""
    rank, failure = _cause(error.failures)
    if failure.exitcode == 2:  # the user's mistake: the worker left the sentence, every rank the same one
        print(failure.message, file=sys.stderr)
        return 2
    if failure.exitcode in (130, 143):
        return failure.exitcode
    reason = (
        f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    )
    print(f"rank {rank} {reason}; its own output above says why", file=sys.stderr)
    return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
