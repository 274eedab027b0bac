"""Side by side with transformers and TRL, each contender in its own process, rounds interleaved.

    python benchmarks/run.py [train|methods|generate|evaluate|load|data|cli|parallel|gpu|all] [--quick] [--rounds N] [--threads N] [--clock wall|cpu] [--model FOLDER]

Prints tables and keeps every measurement as JSON under benchmarks/results/. Nothing here is a test: numbers are looked at.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from measure import Options, Table, machine, versions  # noqa: E402

BENCHMARKS = ["cli", "data", "load", "generate", "evaluate", "train", "methods", "parallel"]
"""What `all` runs; gpu needs a machine with one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}, gpu; default: all but gpu")
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it works, not to quote")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which every contender runs once")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each contender; fewer than cores where others work too"
    )
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor seconds, for a machine that is not idle",
    )
    parser.add_argument("--model", type=Path, help="for evaluate: a model of yours instead of one with random weights")
    words = parser.parse_args()
    if unknown := set(words.names) - {*BENCHMARKS, "gpu", "all"}:
        parser.error(f"no benchmark {min(unknown)}")
    model = words.model and str(words.model.resolve())
    options = Options(words.quick, 1 if words.quick else words.rounds, words.threads, words.clock, model)
    names = [name for name in words.names if name != "all"] or BENCHMARKS
    for name in names:
        print(f"{name} …", flush=True)
        started = datetime.datetime.now(datetime.UTC)
        with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as folder:
            tables = importlib.import_module(f"bench_{name}").measure(Path(folder), options)
        for table in tables:
            print("\n" + table.markdown(), flush=True)
        if not options.quick:
            print(f"kept in {_keep(name, started, options, tables)}\n", flush=True)


def _keep(name: str, started: datetime.datetime, options: Options, tables: list[Table]) -> Path:
    (HERE / "results").mkdir(exist_ok=True)
    of = Path(options.model).name if options.model else None
    path = HERE / "results" / f"{name}-{of}.json" if of else HERE / "results" / f"{name}.json"
    record = {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "started": started.isoformat(timespec="seconds"),
        "options": vars(options) | {"model": of},
        "machine": machine(),
        "versions": versions(),
        "tables": [vars(table) for table in tables],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
