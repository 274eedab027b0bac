"""One process of a run on several: reads the resolved config from its environment and starts the recipe."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.cli.launch import CONFIG_VARIABLE
from tunesmith.cli.run import start
from tunesmith.config import load
from tunesmith.errors import UserError, fault_of_the_machine


def main() -> int:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(os.environ[CONFIG_VARIABLE], encoding="utf-8")
            loaded = load([str(file)])
        return start(loaded)
    except UserError as error:
        return _leave_for_the_launcher(error)
    except OSError as error:
        if (explained := fault_of_the_machine(error)) is None:
            raise
        return _leave_for_the_launcher(explained)
    except KeyboardInterrupt:
        return 130


def _leave_for_the_launcher(error: UserError) -> int:
    """The launcher prints the sentence once, instead of every rank."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}), encoding="utf-8")
    else:
        print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
