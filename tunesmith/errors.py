"""What the user can mend is a UserError: shown as its text alone, exit code 2. Any other exception is our bug and keeps its traceback."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that says what is wrong, where, and what to do."""


class LostContact(Exception):
    """A message between ranks could not be delivered: another rank is gone, and this one can't go on without it."""


def fault_of_the_machine(error: OSError) -> UserError | None:
    """What to tell the user of a full disk or a file that may not be touched; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return UserError(f"no space left on the disk{where}: free some and try again; what was saved before is whole")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return UserError(f"{error.filename}: no access ({error.strerror}); check its permissions, or name another")
    return None


class ConfigError(UserError, ValueError):
    """What was written can't be turned into a config; the message has one line per mistake, each with its place."""


class MissingExtra(UserError, ImportError):
    """An optional package is needed and absent; the message names it and how to install it."""


def require(package: str, extra: str, purpose: str):
    """Import and return an optional `package`, or raise MissingExtra: `purpose` says what needs it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = package.partition(".")[0]
        raise MissingExtra(
            f"{purpose} needs the package {missing}, which is not installed: pip install 'tunesmith[{extra}]'"
        ) from error
