"""Files and folders that appear whole or not at all: written under another name, sent to the disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from common.errors import FailureError
from common.files.locks import HeldError, Lock

PARTIAL = ".aim-partial"
"""End of the name of a file that is being written."""
MOMENT = 1.0
"""Seconds to wait for the lock of such a file: `remove_leftovers` of another process holds it for a moment."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
EXCHANGE, AT_FDCWD = 2, -100
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF)


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Give an OSError that names no file this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content becomes the file `path` at the end: at any moment it has the old or all of the new.

    The file has the permissions of any new file (umask). What a killed process left of such files in the folder is
    removed.

    Raises:
        FailureError: `path` is a folder, or another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise FailureError(f"{path} is a folder; a file name was expected.")
    remove_leftovers(path.parent)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    lock = _lock_partial(path, partial)
    try:
        with naming(path):
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            if lock.file != partial:  # no flock here: the lock is a file of its own
                partial.unlink(missing_ok=True)
            lock.release(remove=True)


def _lock_partial(path: Path, partial: Path) -> Lock:
    """Lock the file that becomes `path`. Raises FailureError where another process holds it longer."""
    deadline = time.monotonic() + MOMENT
    while True:
        try:
            return Lock.acquire(partial)
        except HeldError as error:
            if time.monotonic() >= deadline:
                raise FailureError(f"{path} is being written by {error.holder}; wait for it.") from None
            time.sleep(0.01)


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises FailureError where `path` is a folder or is being written by another process."""
    with written(path) as stream:
        stream.write(content)


def remove_leftovers(folder: Path) -> None:
    """Remove files that a killed process left half-written in a folder; those that are being written stay."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(".") and entry.name.endswith(PARTIAL) and entry.is_file(follow_symlinks=False):
                with suppress(HeldError, OSError):
                    Lock.acquire(Path(entry.path)).release(remove=True)


def sync_folder(folder: Path) -> None:
    """Send a folder's entries to the disk, where its file system can."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            error.filename = str(folder)
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Send all files and folders below a folder, and itself, to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            if stat.S_ISREG(os.lstat(file).st_mode):
                with naming(file), file.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(Path(place))


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    function = _renameat2()
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _renameat2() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function


def copy_attributes(source: Path, target: Path) -> None:
    """Give a folder the mode, group, owner and extended attributes of another, as far as this process may."""
    info = os.stat(source)
    with suppress(OSError):
        os.chown(target, -1, info.st_gid)
    with suppress(OSError):
        os.chown(target, info.st_uid, -1)
    if hasattr(os, "listxattr"):  # access control lists among them
        with suppress(OSError):
            for name in os.listxattr(source):
                with suppress(OSError):
                    os.setxattr(target, name, os.getxattr(source, name))
    with suppress(OSError):  # last: chown clears the set-group-ID bit
        os.chmod(target, stat.S_IMODE(info.st_mode))
