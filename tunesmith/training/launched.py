"""What `tune run`'s launcher and its workers agree on. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

NOTES_VARIABLE = "TUNESMITH_NOTES"
"""Names the folder where workers leave what the launcher of their node should know: how far they are (rank-N.json), why they
ended (ended.json), what was said already (said-…)."""
LAUNCHER_VARIABLE = "TUNESMITH_LAUNCHER"
"""The launcher's process id: its workers end when it is gone."""

LOST_CONTACT = 77
"""Exit code of a worker that could not go on because another one is gone."""
REPORTED = 78
"""Exit code of workers of which one has told the user why all of them end."""


def notes_folder() -> Path | None:
    """The folder of notes; None for a process that `tune run` did not launch."""
    name = os.environ.get(NOTES_VARIABLE)
    return Path(name) if name and os.path.isdir(name) else None


def is_first(name: str) -> bool:
    """Whether no other worker of this node has asked this about `name`."""
    folder = notes_folder()
    if folder is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        os.close(os.open(folder / f"said-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
