"""Exclusive locks on files: flock, compared by inode, or a file with its holder where the file system has no flock."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files.bounded_reading import read_json
from common.files.json_values import JsonObject

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of flock on a file system that has none."""
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
ATTEMPTS = 100


class HeldError(Exception):
    """The lock is held by another process; `holder` names it as far as it is known."""

    def __init__(self, file: Path, holder: str) -> None:
        super().__init__(f"{file} is held by {holder}")
        self.file, self.holder = file, holder


class Lock:
    """An exclusive lock on `file`, from `acquire` to `release`; a process that dies releases it.

    The lock counts only while `file` is the inode that was locked: a file that was removed and made again meanwhile is
    another lock.
    """

    def __init__(self, file: Path, handle: int) -> None:
        self.file, self._handle = file, handle

    @classmethod
    def acquire(cls, file: Path) -> Lock:
        """Lock a file, which is created where it is missing.

        Raises:
            HeldError: Another process holds the lock.
            FileNotFoundError: The folder of the file does not exist.
        """
        for _ in range(ATTEMPTS):
            handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                has_flock = _flock(handle, file)
                if has_flock and _is_same(handle, file):
                    _write_holder(handle)
                    return cls(file, handle)
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            if not has_flock:
                return cls._by_file(file)
            # else the file was removed by its last holder meanwhile
        raise HeldError(file, "other processes in turn")

    @classmethod
    def _by_file(cls, file: Path) -> Lock:
        """Lock by a file that is there as long as its holder lives."""
        lock_file = file.with_name(f"{file.name}.held")
        for _ in range(ATTEMPTS):
            try:
                handle = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not _remove_dead(lock_file):
                    raise HeldError(
                        lock_file, f"{_holder(lock_file)}; where that has ended, remove {lock_file}"
                    ) from None
                continue
            _write_holder(handle)
            return cls(lock_file, handle)
        raise HeldError(lock_file, "other processes in turn")

    @property
    def descriptor(self) -> int:
        """File descriptor of the lock; a child that inherits it holds the lock as long as it lives, too."""
        return self._handle

    def is_valid(self) -> bool:
        """Return whether the lock is held and its file is still the one under its name."""
        return self._handle >= 0 and _is_same(self._handle, self.file)

    def release(self, remove: bool = False) -> None:
        """Give the lock back, once; remove: remove the file first, while it is still held."""
        if self._handle < 0:
            return
        if (remove or self.file.suffix == ".held") and self.is_valid():
            self.file.unlink(missing_ok=True)
        handle, self._handle = self._handle, -1  # its number may soon be another file's
        os.close(handle)


@contextmanager
def locked(file: Path, remove: bool = True) -> Iterator[Lock]:
    """Hold the lock on a file; remove: remove the file at the end. Raises HeldError."""
    lock = Lock.acquire(file)
    try:
        yield lock
    finally:
        lock.release(remove)


def _flock(handle: int, file: Path) -> bool:
    """Lock an open file; False where the file system has no such locks. Raises HeldError."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        if error.errno in BUSY:
            raise HeldError(file, _holder(file)) from None
        error.filename = str(file)
        raise
    return True


def _is_same(handle: int, file: Path) -> bool:
    try:
        by_name = os.lstat(file)
    except FileNotFoundError:
        return False
    opened = os.fstat(handle)
    return (opened.st_dev, opened.st_ino) == (by_name.st_dev, by_name.st_ino)


def _this_process() -> JsonObject:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}


def _machine() -> str:
    """Name this boot of this machine and its process numbers, which a container has for itself."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when a process started, which tells it from a later one of the same number; None where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _write_holder(handle: int) -> None:
    """Write who holds the lock, for messages; a full disk is no reason to have no lock."""
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
    except OSError:
        pass


def _read_holder(file: Path) -> JsonObject:
    try:
        holder = read_json(file)
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(file: Path) -> str:
    holder = _read_holder(file)
    if not holder:
        return "another process"
    return f"another process (number {holder.get('pid')} on {holder.get('host')})"


def _remove_dead(lock_file: Path) -> bool:
    """Remove a lock file whose holder has ended; False where it lives, or where that cannot be known."""
    holder = _read_holder(lock_file)
    try:
        before = os.lstat(lock_file).st_ino
    except FileNotFoundError:
        return True
    if holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    if _started(holder["pid"]) == holder.get("started") and _is_alive(holder["pid"]):
        return False
    try:
        if os.lstat(lock_file).st_ino == before:
            lock_file.unlink()
    except FileNotFoundError:
        pass
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
