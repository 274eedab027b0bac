"""Folders in object stores and on other machines (s3://, gs://, hf://, file://, …) through fsspec. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, UserError, require

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
_COMPLETE = ".complete"


def is_remote(name: str) -> bool:
    """Whether `name` is a URL such as s3://bucket/folder."""
    return _URL.match(name) is not None


def fetch(url: str, what: str = "folder", ignore_patterns: Sequence[str] = ()) -> Path:
    """A local copy of the folder at `url`, in the cache; fetched once by one process of a node, and anew when it has changed there.

    Raises UserError where there is no such folder, or it can't be reached.
    """
    system, root = _open(url)
    try:
        files = _list(system, root, ignore_patterns)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{url} ({what}) can't be reached ({_first_line(error)}): check the address and your credentials"
        ) from error
    if not files:
        raise UserError(f"there is no folder {url} ({what}), or it is empty")
    version = hashlib.sha256(json.dumps([url, *sorted(files.items())]).encode()).hexdigest()[:24]
    folder = _cache() / version
    with _held(folder.with_suffix(".lock")):
        if not (folder / _COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _download(system, root, list(files), folder, url)
    return folder


def _open(url: str) -> tuple[Any, str]:
    """(file system, path in it)."""
    fsspec = require("fsspec", "remote", f"a folder such as {url}")
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "of that protocol")
        raise MissingExtra(
            f"{url} needs the package {package}, which is not installed: pip install 'tunesmith[remote]'"
        ) from error
    except ValueError as error:
        raise UserError(f"{url}: no protocol {scheme}:// is known ({_first_line(error)})") from error


def _list(system: Any, root: str, ignore_patterns: Sequence[str]) -> dict[str, str]:
    """{name below the folder: what tells its content from another}."""
    found = {}
    for path, info in system.find(root, detail=True).items():
        name = path[len(root.rstrip("/")) :].lstrip("/")
        if name and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
            found[name] = (
                f"{info['size']} {info.get('ETag') or info.get('etag') or info.get('mtime') or info.get('created') or ''}"
            )
    return found


def _download(system: Any, root: str, names: list[str], folder: Path, url: str) -> None:
    try:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{root.rstrip('/')}/{name}", str(target))
    except OSError as error:
        raise UserError(
            f"{url}: could not be fetched ({_first_line(error)}); what is there is fetched again next time"
        ) from error
    (folder / _COMPLETE).touch()  # last: what was cut off is never taken for whole


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    folder = Path(os.environ.get("TUNESMITH_CACHE") or home) / "remote"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Wait until no other process of this node fetches the same."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
