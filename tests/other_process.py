"""Runs of the command in a process of their own, which may be stopped or killed on the way.

Children are forked from a server that has imported torch but never computed: starting one takes a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tunesmith.recipes.sft", "other_process"])


def train_in_process(
    words: list[str],
    stop_at: int | None = None,
    with_signal: int | None = None,
    kill_at: int | None = None,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """`tune run WORDS…` in another process; its exit code, negative where a signal killed it.

    stop_at: send it `with_signal` while it logs that step. kill_at: SIGKILL at the n-th opening, making, renaming or
    removing of a file or folder below `folder`.
    """
    process = _CONTEXT.Process(
        target=_train, args=(words, stop_at, with_signal, kill_at, str(folder), environment or {})
    )
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the run did not end within two minutes")
    return process.exitcode


def _train(
    words: list[str],
    stop_at: int | None,
    with_signal: int | None,
    kill_at: int | None,
    folder: str,
    environment: dict[str, str],
) -> None:
    from tunesmith.config import load_config, run
    from tunesmith.training.run import Run

    os.environ.update(environment)
    if stop_at is not None:
        log = Run.log

        def log_and_stop(self, step, stats, **more):
            log(self, step, stats, **more)
            if step == stop_at:
                os.kill(os.getpid(), with_signal or signal.SIGTERM)

        Run.log = log_and_stop
    if kill_at is not None:
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(arguments[0]):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    run(load_config(*words))
