"""A hidden folder beside a file or folder that is being made, which holds what an interrupted run finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import FailureError, UsageError
from common.files.atomic import naming
from common.files.bounded_reading import read_json
from common.files.locks import HeldError, Lock

LOCK, MARK = "lock", "work_folder.json"
FORMAT = "activation-informed-merging work folder"
OWN = (LOCK, f"{LOCK}.held", MARK)
"""Names of the files that make a folder a work folder."""
TAKEN_UP = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""Errors of removing a folder that another process came into, or removed, meanwhile."""
LOOKS, PAUSE = 10, 0.005
"""Number of attempts, and seconds between them, for a folder that another process may be changing."""


class WorkFolder:
    """A folder of this program's, locked by this process; see `claimed`."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path, self.lock = path, lock

    def check(self) -> None:
        """Raise FailureError where the folder is no longer this process's."""
        if not self.lock.is_valid():
            raise FailureError(f"{self.path} was removed or taken by another process during the run; start anew.")

    def clear(self) -> None:
        """Remove what is in it."""
        for path in self.path.iterdir():
            if path.name not in OWN:
                remove(path)

    def remove(self) -> None:
        """Remove it with all that is in it; a process that waits for it makes a new one."""
        self.clear()
        (self.path / MARK).unlink(missing_ok=True)
        self.lock.release(remove=True)
        if self.lock.file.name != LOCK:  # without flock the lock was another file
            (self.path / LOCK).unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno not in TAKEN_UP:
                raise


@contextmanager
def claimed(path: Path, purpose: str) -> Iterator[WorkFolder]:
    """Yield the work folder at `path`, created where it is missing; it stays unless `remove` is called.

    Args:
        path: The folder.
        purpose: What it is for, for messages ("--save_path out").

    Raises:
        UsageError: There is a link, a file, or a folder that this program did not make, or of another user.
        FailureError: Another process is working in it.
    """
    folder = claim(path, purpose)
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.lock.release()


def claim(path: Path, purpose: str) -> WorkFolder:
    """Return the work folder at `path`, locked until its `remove` or the lock's release. Raises as `claimed` does."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(path)
        try:
            before = os.lstat(path)
            _check_owned(path, before, purpose)
            lock = Lock.acquire(path / LOCK)
        except FileNotFoundError:  # its last owner removed it
            continue
        except HeldError as error:
            holder = error.holder[0].upper() + error.holder[1:]
            raise FailureError(f"{holder} is writing {purpose}; wait for it or give another place.") from None
        try:
            now = os.lstat(path)
            if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
                raise FileNotFoundError(path)
            if not (path / MARK).exists():
                _write_marker(path / MARK, purpose)
        except FileNotFoundError:
            lock.release()
            continue
        except BaseException:
            lock.release()
            raise
        return WorkFolder(path, lock)


def _write_marker(marker: Path, purpose: str) -> None:
    with naming(marker):
        handle = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(handle, (json.dumps({"format": FORMAT, "for": purpose}) + "\n").encode())
        finally:
            os.close(handle)


def is_work_folder(path: Path) -> bool:
    """Return True where this program created the folder at `path`; False for a link."""
    try:
        names = set(os.listdir(path))
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return False
        if names <= set(OWN):  # also with an incomplete marker file
            return True
        marker = path / MARK
        content = None if marker.is_symlink() else read_json(marker)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _check_owned(path: Path, info: os.stat_result, purpose: str) -> None:
    """Raise UsageError for a path that must be neither cleared nor written into."""
    advice = f"{purpose} needs that name for its unfinished output; move it away or give another place."
    if stat.S_ISLNK(info.st_mode):
        raise UsageError(f"{path} is a link: {advice}")
    if not stat.S_ISDIR(info.st_mode):
        raise UsageError(f"{path} is a file: {advice}")
    for _ in range(LOOKS):
        if is_work_folder(path):
            break
        if not path.exists():
            raise FileNotFoundError(path)
        time.sleep(PAUSE)
    else:
        raise UsageError(f"{path} is a folder that this program did not make: {advice}")
    if hasattr(os, "geteuid") and info.st_uid != os.geteuid():
        above = os.stat(path.parent)
        is_shared = (
            above.st_mode & stat.S_ISVTX and above.st_mode & stat.S_IWOTH
        )  # as /tmp: others may have put it there
        if is_shared or (os.geteuid() and info.st_mode & stat.S_IWOTH):
            raise UsageError(f"{path} is another user's in a place where anybody may write: {advice}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, which a run cut short may have made unreadable."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
