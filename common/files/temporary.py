"""Temporary folders of this process, removed at its end; those of processes that were killed, by the next one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files.locks import HeldError, Lock

PREFIX = "activation-informed-merging-"
LOCK = "lock"

_root: tuple[int, Path, Lock] | None = None
"""Process number, folder and lock of this process's temporary folder."""


def new_folder(purpose: str) -> Path:
    """Return a new empty folder that only this user reads, removed when the process ends."""
    return Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=_folder()))


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a new empty folder that is removed at the end."""
    folder = new_folder(purpose)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def download_folder(place: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `place`, removed at the end; those of killed processes with this prefix are removed first.

    Args:
        place: An existing folder, on the file system of what will be renamed out of the new one.
        prefix: Beginning of the names, of this purpose alone (".fetch-").
    """
    remove_stale(place, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        with suppress(HeldError, FileNotFoundError):  # a process that looks for stale ones was faster
            lock = Lock.acquire(folder / LOCK)
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def is_temporary(file: Path) -> bool:
    """Return whether a file is in a temporary folder of this process."""
    return _root is not None and _root[1] in file.parents


def _folder() -> Path:
    """Return the folder that holds all temporary folders of this process; those of dead processes are removed first."""
    global _root
    if _root is not None and _root[0] == os.getpid() and _root[1].is_dir():
        return _root[1]
    place = Path(tempfile.gettempdir())
    remove_stale(place)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)).resolve()
        with suppress(HeldError, FileNotFoundError):  # a process that looks for stale ones was faster
            _root = (os.getpid(), folder, Lock.acquire(folder / LOCK))
            atexit.register(_remove, os.getpid(), folder)
            return folder


def remove_stale(place: Path, prefix: str = PREFIX) -> None:
    """Remove this user's temporary folders in `place` whose process has ended."""
    user = os.geteuid() if hasattr(os, "geteuid") else None
    for folder in place.glob(f"{prefix}*"):
        with suppress(HeldError, OSError):
            if folder.is_symlink() or not folder.is_dir() or (user is not None and folder.stat().st_uid != user):
                continue
            lock = Lock.acquire(folder / LOCK)
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def _remove(process: int, folder: Path) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
