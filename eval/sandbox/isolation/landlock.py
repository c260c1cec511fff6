"""Landlock: file access by a list of paths, no TCP, no abstract Unix sockets, no signals to other processes.

ctypes, because the Python bindings on the package index are pre-releases without scopes (ABI 6). The numbers are those
of linux/landlock.h; https://docs.kernel.org/userspace-api/landlock.html describes the versions of the interface.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from eval.sandbox.isolation.syscalls import (
    LANDLOCK_ADD_RULE,
    LANDLOCK_CREATE_RULESET,
    LANDLOCK_RESTRICT_SELF,
    LIBC,
    syscall,
)

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
ACCESS_BY_ABI = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
FILE_ACCESS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15
READ = READ_FILE | READ_DIR
TCP = 0b11  # bind and connect
SCOPES = 0b11  # abstract Unix sockets and signals


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Return the kernel's Landlock ABI; 0 where there is none."""
    return max(0, int(LIBC.syscall(ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), 1)))


def restrict(readable: Iterable[str], writable: Iterable[str] = (), listable: Iterable[str] = ()) -> None:
    """Allow this process to read below `readable` and to read and write below `writable`, and no other file.

    Args:
        readable: files and folders; those that do not exist are skipped.
        writable: folders.
        listable: folders of which names may be read, at any depth, but no files.

    Raises:
        OSError: the kernel has no Landlock, or no_new_privs is not set.
    """
    abi = version()
    if not abi:
        raise OSError("this kernel has no Landlock")
    access = ACCESS_BY_ABI[min(abi, 5)]
    ruleset = _Ruleset(access, TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    number = syscall(
        LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", ctypes.byref(ruleset), ctypes.c_size_t(size), 0
    )
    try:
        for paths, allowed in ((readable, READ), (writable, access & ~EXECUTE), (listable, READ_DIR)):
            for path in paths:
                _allow(number, path, allowed & access)
        syscall(LANDLOCK_RESTRICT_SELF, "landlock_restrict_self", number, 0)
    finally:
        os.close(number)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= FILE_ACCESS
        rule = _PathRule(access, parent)
        syscall(LANDLOCK_ADD_RULE, "landlock_add_rule", ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(parent)
