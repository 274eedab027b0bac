"""Several ranks on this machine, for tests: processes forked from a server that has imported torch but never computed.

results = run_distributed(function, 2, argument, …)     # what `function` returned on each rank
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tunesmith.recipes.sft", "tunesmith.recipes.pretrain", "torch.distributed.fsdp", "other_process", "distributed"]
)


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*arguments)` on `world_size` ranks with one thread each; what it returned on each.

    Raises the traceback of the first rank that failed, and TimeoutError for ranks that hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, environment, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for process in processes:
            process.kill()
        outcomes = [_outcome(Path(folder, str(rank))) for rank in range(world_size)]
        for rank, (error, _, _) in sorted(enumerate(outcomes), key=lambda item: item[1][2]):
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
        if hanging:
            raise TimeoutError(f"ranks {hanging} did not end within {timeout} seconds")
        return [result for _, result, _ in outcomes]


def _free_port() -> int:
    """Below those that the system gives to outgoing connections, of which one could take it before the ranks do."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("", port))
            return port


def _outcome(path: Path) -> tuple[str | None, Any, float]:
    if not path.exists():
        return "it ended without a word", None, float("inf")
    error, result = pickle.loads(path.read_bytes())  # our own processes wrote it
    return error, result, path.stat().st_mtime


def _rank(rank: int, environment: dict[str, str], folder: str, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        outcome = (None, function(*arguments))
    except BaseException:  # the parent raises it
        outcome = (traceback.format_exc(), None)
    temporary = Path(folder, f".{rank}")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(Path(folder, str(rank)))
    os._exit(0)
