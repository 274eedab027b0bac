"""The command line: how long a word takes to answer, against the bare interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

from measure import Options, Table, median, run_process

import tunesmith

BIN = Path(sys.executable).parent
TINY = Path(tunesmith.__file__).parent / "assets" / "tiny"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "tune --help": [str(BIN / "tune"), "--help"],
    "tune ls": [str(BIN / "tune"), "ls"],
    "tune cat sft": [str(BIN / "tune"), "cat", "sft"],
    "tune ls sft": [str(BIN / "tune"), "ls", "sft"],
    "tune cp sft": [str(BIN / "tune"), "cp", "sft", "sft.yaml"],
    "tune validate sft": [str(BIN / "tune"), "validate", "sft", f"model={TINY}", "dataset.source=alpaca", "output_dir=new"],
    "trl --help": [str(BIN / "trl"), "--help"],
}  # fmt: skip


def measure(folder: Path, options: Options) -> list[Table]:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(1 + 5 * options.rounds):
        for name, words in COMMANDS.items():
            one = run_process(words, folder, options)
            if number:  # the first compiles bytecode
                seconds[name].append(one.seconds)
    bare = seconds["python -c pass"]
    rows = [
        [name, 1000 * median(ones), 1000 * median(a - b for a, b in zip(ones, bare))] for name, ones in seconds.items()
    ]
    return [Table(f"cli: {options.clock} time", ["", "ms", "ms beyond the bare interpreter"], rows, seconds)]
