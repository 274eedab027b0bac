"""One process of a run on several: reads the resolved config from its environment and starts the recipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.cli.launch import CONFIG_VARIABLE
from tunesmith.cli.run import start
from tunesmith.config import load
from tunesmith.errors import LostContact, UserError, fault_of_the_machine
from tunesmith.training.launched import LAUNCHER_VARIABLE, LOST_CONTACT, notes_folder


def main() -> int:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(os.environ[CONFIG_VARIABLE], encoding="utf-8")
            loaded = load([str(file)])
        return start(loaded)
    except LostContact as error:
        _leave_message(str(error))
        time.sleep(3)  # who is the cause ends first, so that the launcher speaks of that one
        return LOST_CONTACT
    except UserError as error:
        return _end_all(2, str(error))
    except OSError as error:
        if (explained := fault_of_the_machine(error)) is None:
            raise
        return _end_all(2, str(explained))
    except KeyboardInterrupt:
        return _end_all(130)
    except SystemExit as error:
        if error.code in (130, 143):
            return _end_all(int(error.code))
        raise


def _end_all(code: int, message: str = "") -> int:
    """Leave the launcher what to say, once instead of every rank; and where it would start the run anew, tell it not to."""
    _leave_message(message)
    folder = notes_folder()
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0 and folder is not None:
        own = folder / f"ended-{os.getpid()}.json"
        own.write_text(json.dumps({"code": code, "message": message}))
        try:
            os.link(own, folder / "ended.json")  # the first one speaks for all
        except FileExistsError:
            return code
        if str(os.getppid()) == os.environ.get(LAUNCHER_VARIABLE):
            os.kill(os.getppid(), signal.SIGUSR1)
    return code


def _leave_message(message: str) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    elif message:
        print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
