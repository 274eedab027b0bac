"""The start of a run: its mesh, its folder and its seed, each agreed on by all processes before anything is loaded."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tunesmith.checkpoint.resume import check_digests, check_same_run, find_newest, read_state
from tunesmith.checkpoint.uploads import Uploads
from tunesmith.configs.layout import Layout
from tunesmith.configs.shared import TrainSettings
from tunesmith.errors import UserError
from tunesmith.parallel.async_tensor import check_async_tensor_parallel
from tunesmith.parallel.device import pick_device
from tunesmith.parallel.mesh import DATA, Mesh, start_mesh, stop_mesh
from tunesmith.remote import is_remote, working_folder
from tunesmith.training.agreement import check_same_everywhere, check_seen_everywhere
from tunesmith.training.folder import check_shared, claim, launch, unclaim
from tunesmith.training.preflight import check
from tunesmith.training.report import write_report
from tunesmith.training.run import Run, fixed_settings
from tunesmith.training.signals import end_on_sigterm, ignore_sigterm
from tunesmith.training.watchdog import FOLDER as HANG_FOLDER
from tunesmith.training.watchdog import Watchdog, noticing_lost_ranks


@contextlib.contextmanager
def start_run(config: TrainSettings, recipe: str) -> Iterator[Run]:
    """Claim the run folder, check the config against the machine, seed, and start the mesh.

    Raises UserError before anything is loaded where something can't work, or where the folder holds another run.
    """
    device = pick_device(config.device)
    uploads, folder = _working_folder(config)
    run: Run | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(stop_mesh)
        agree = partial(check_same_everywhere, config=config)
        with noticing_lost_ranks(lambda: "at the start"):
            # The watchdog, who knows more, speaks before a message is given up.
            patience = config.dist_timeout_seconds + 15
            mesh = start_mesh(device, Layout.of(config), patience, agree, reports=str(folder / HANG_FOLDER))
        watchdog = Watchdog(mesh, folder, config.dist_timeout_seconds)
        stack.callback(watchdog.close)
        stack.enter_context(noticing_lost_ranks(watchdog.where))
        mesh.ranks.on_all(lambda: check(config, folder_is_checked_later=True))
        if config.enable_async_tensor_parallel:
            check_async_tensor_parallel(mesh)
        claimed = _claimed(folder, config.resume_from_checkpoint, uploads)
        resumes = mesh.ranks.from_main(lambda: stack.enter_context(claimed))
        try:
            check_shared(folder, mesh.ranks, uploads.url if uploads else None)
            stack.enter_context(end_on_sigterm())
            if uploads is not None:
                uploads.take(launch(), resumes, mesh.ranks)
            resume_from = mesh.ranks.from_main(lambda: find_newest(folder)) if resumes else None
            if resume_from is not None:
                check_seen_everywhere(resume_from, mesh.ranks)
                check_digests(resume_from, mesh.ranks, uploads.place(resume_from) if uploads else None)
                if uploads is not None and not mesh.ranks.from_main(lambda: uploads.is_there(resume_from)):
                    uploads.push(resume_from, mesh.ranks)  # a killed run did not come to it
            _draw_seed(config, resume_from, mesh)
            if resume_from is not None:
                mesh.ranks.on_all(lambda: check_same_run(resume_from, fixed_settings(config, recipe)))
            seed_everything((config.seed or 0) + mesh.index("pp", *DATA, "cp"), config.deterministic)
            run = Run(config, recipe, mesh, folder, watchdog, resume_from, uploads)
            stack.callback(run.close)
            with run.memory_snapshots:
                yield run
        except BaseException as error:
            if isinstance(error, Exception):
                ignore_sigterm()
            if mesh.is_main and not (resumes or (run is not None and run.has_begun)):
                unclaim(folder)
            raise


def _working_folder(config: TrainSettings) -> tuple[Uploads | None, Path]:
    """The folder that the run works in; and where that is not `output_dir` itself, what brings it there."""
    if not is_remote(config.output_dir):
        return None, Path(config.output_dir)
    folder = working_folder(config.output_dir)
    return Uploads(config.output_dir, folder, config.keep_last_n_checkpoints, partial(write_report, folder)), folder


@contextlib.contextmanager
def _claimed(folder: Path, resume: bool, uploads: Uploads | None) -> Iterator[bool]:
    """Hold the run folder; gives whether the run goes on with what is in it."""
    held = claim(folder, resume, uploads)
    clean = False
    try:
        yield held.resumes
        clean = True
    except (UserError, SystemExit):
        clean = True
        raise
    finally:
        if clean and uploads is not None:
            uploads.let_go()
        held.release(clean)


def _draw_seed(config: TrainSettings, resume_from: Path | None, mesh: Mesh) -> None:
    """Fill in the seed where none is given: the one that was drawn before, or a new one."""
    if config.seed is None:
        drawn = read_state(resume_from)["fingerprint"]["seed"] if resume_from is not None else None
        config.seed = mesh.ranks.from_main(lambda: int.from_bytes(os.urandom(4), "little")) if drawn is None else drawn


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's and torch's generators; with `deterministic`, refuse kernels that are not."""
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic or torch.are_deterministic_algorithms_enabled():  # even turning it off imports the compiler
        torch.use_deterministic_algorithms(deterministic)
