"""What all processes of a run must have alike: config, versions, the checkpoint to go on from."""

from __future__ import annotations

import platform
from itertools import zip_longest
from pathlib import Path

import torch

import tunesmith
from tunesmith.config import dump_config
from tunesmith.configs.shared import TrainSettings
from tunesmith.errors import UserError
from tunesmith.parallel.mesh import Ranks


def check_same_everywhere(ranks: Ranks, config: TrainSettings) -> None:
    """Raise the same UserError on every rank where one has another config or other versions."""
    own = {
        "tunesmith": tunesmith.__version__,
        "torch": torch.__version__,
        "config": dump_config(config),
        "host": platform.node(),
    }
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, 1):
        for what in ("tunesmith", "torch", "config"):
            if other[what] != first[what]:
                pair = (other[what], first[what]) if what != "config" else _first_difference(other[what], first[what])
                raise UserError(
                    f"rank {rank} (on {other['host']}) has another {'config' if what == 'config' else f'version of {what}'} than "
                    f"rank 0 (on {first['host']}): {pair[0]} instead of {pair[1]}; start all with the same"
                )


def _first_difference(one: str, other: str) -> tuple[str, str]:
    """The first line in which two configs differ, of each."""
    pairs = zip_longest(one.splitlines(), other.splitlines(), fillvalue="nothing")
    return next((_option(a), _option(b)) for a, b in pairs if a != b)


def _option(line: str) -> str:
    """A line of a config without its comment."""
    return f"`{line.partition('  #')[0].strip()}`"


def check_seen_everywhere(folder: Path, ranks: Ranks) -> None:
    """Raise the same UserError on every rank where one does not see the checkpoint in `folder` whole, as rank 0 does."""
    own = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    (first, main_host), *others = ranks.gather((own, platform.node()))
    for rank, (seen, host) in enumerate(others, 1):
        different = [name for name in sorted({*seen, *first}) if seen.get(name) != first.get(name)]
        if different:
            what = "is absent" if not seen else f"{different[0]} is absent or of another size"
            raise UserError(
                f"{folder} is not the same for all: on {host} (rank {rank}) {what}, unlike on {main_host} (rank 0); "
                "`output_dir` must be a folder that all nodes share, or be copied whole to each"
            )
