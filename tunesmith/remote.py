"""Folders in object stores and on other machines (s3://, gs://, hf://, file://, …) through fsspec. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import MissingExtra, UserError, require

T = TypeVar("T")

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
_PAUSES = (1.0, 5.0, 20.0)
"""Seconds before something that failed is tried again."""
_IN_VAIN = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)
"""What a second try would not mend."""


def is_remote(name: str) -> bool:
    """Whether `name` is a URL such as s3://bucket/folder."""
    return _URL.match(name) is not None


def fetch(url: str, what: str = "folder", ignore_patterns: Sequence[str] = ()) -> Path:
    """A local copy of the folder at `url`, in the cache; fetched once by one process of a node, and anew when it has changed there.

    A file checkpoints/latest stands for the checkpoint that it names. Raises UserError where there is no such folder, or it
    can't be reached.
    """
    system, root = _open(url)
    try:
        if root.endswith("/latest") and system.isfile(root):
            url, root = (f"{_parent(one)}/{system.cat_file(root).decode().strip()}" for one in (url, root))
        files = _list(system, root, ignore_patterns)
    except Exception as error:  # of somebody else's package, which has errors of its own
        raise UserError(
            f"{url} ({what}) can't be reached ({_first_line(error)}): check the address and your credentials"
        ) from error
    if not files:
        raise UserError(f"there is no folder {url} ({what}), or it is empty")
    version = hashlib.sha256(json.dumps([url, *sorted(files.items())]).encode()).hexdigest()[:24]
    folder = _cache("remote") / version
    folder.parent.mkdir(parents=True, exist_ok=True)
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
    except Exception as error:
        raise UserError(
            f"{url}: could not be fetched ({_first_line(error)}); what is there is fetched again next time"
        ) from error
    (folder / _COMPLETE).touch()  # last: what was cut off is never taken for whole


def _cache(kind: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    return Path(os.environ.get("TUNESMITH_CACHE") or home) / kind


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Wait until no other process of this node fetches the same."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- folders that are written to -----------------------------------------------------------------


def working_folder(url: str) -> Path:
    """Where a run whose output_dir is `url` works: the same for the same URL, so that a run that was killed goes on."""
    url = url.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return _cache("runs") / digest / url.rpartition("/")[2]


def missing_package(url: str) -> str | None:
    """What is wrong with the protocol of `url`, told without reaching for it or importing its package; None: nothing is."""
    import importlib.util

    if importlib.util.find_spec("fsspec") is None:
        return f"{url} needs the package fsspec, which is not installed: pip install 'tunesmith[remote]'"
    from fsspec.registry import known_implementations, registry

    scheme = url.partition("://")[0]
    if scheme in registry:
        return None
    if scheme not in known_implementations:
        return f"no protocol {scheme}:// is known to fsspec; s3://, gs://, hf:// and file:// are"
    package = known_implementations[scheme]["class"].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{url} needs the package {_PACKAGES.get(scheme, package)}, which is not installed: pip install 'tunesmith[remote]'"
    return None


class RemoteFolder:
    """A folder at a URL, to read and write. Whatever goes wrong is a UserError of one sentence; what may pass is tried again first."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        system, root = _open(self.url)
        return system, root.rstrip("/")

    def files(self, below: str = "") -> dict[str, int]:
        """{name: bytes} of all files, or those `below` a folder/; none where there is no such folder."""
        system, root = self._opened

        def find() -> dict[str, int]:
            system.invalidate_cache()  # others may have written since
            try:
                found = system.find(f"{root}/{below}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            return {path[len(root) + 1 :]: info["size"] for path, info in found.items() if path.startswith(f"{root}/")}

        return {name: size for name, size in self._patiently("read", find).items() if name.startswith(below)}

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""
        system, root = self._opened

        def read() -> bytes | None:
            try:
                return system.cat_file(f"{root}/{name}")
            except FileNotFoundError:
                return None

        return self._patiently("read", read)

    def write(self, name: str, content: bytes) -> None:
        system, root = self._opened
        self._patiently("written", lambda: self._with_parent(name, lambda: system.pipe_file(f"{root}/{name}", content)))

    def upload(self, path: Path, name: str) -> None:
        system, root = self._opened
        self._patiently(
            "written", lambda: self._with_parent(name, lambda: system.put_file(str(path), f"{root}/{name}"))
        )

    def download(self, name: str, path: Path) -> None:
        system, root = self._opened
        path.parent.mkdir(parents=True, exist_ok=True)
        self._patiently("read", lambda: system.get_file(f"{root}/{name}", str(path)))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files in this order; and the folders that are left empty, where folders are things of their own."""
        system, root = self._opened
        names = list(names)

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(f"{root}/{name}")

        for name in names:
            self._patiently("cleared", lambda name=name: remove(name))
        if system.async_impl:
            return  # an object store, which has no folders
        for folder in sorted({_parent(name) for name in names} - {""}, reverse=True):  # the inner ones first
            with contextlib.suppress(Exception):  # one that is not empty
                system.rmdir(f"{root}/{folder}")

    def _with_parent(self, name: str, write: Callable[[], Any]) -> None:
        """`write()`; where it misses its folder, that is made. A bucket never is: its name may be mistyped."""
        system, root = self._opened
        try:
            write()
        except FileNotFoundError:
            top = root[: root.find("/", 1)] if "/" in root[1:] else root
            if not system.exists(top):
                raise
            system.makedirs(_parent(f"{root}/{name}"), exist_ok=True)
            write()

    def _patiently(self, what: str, act: Callable[[], T]) -> T:
        for pause in (*_PAUSES, None):
            try:
                return act()
            except Exception as error:  # of somebody else's package, which has errors of its own
                if pause is None or isinstance(error, _IN_VAIN) or "Credentials" in type(error).__name__:
                    raise UserError(
                        f"{self.url} can't be {what} ({_first_line(error)}): check the address, your credentials and the network"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")
