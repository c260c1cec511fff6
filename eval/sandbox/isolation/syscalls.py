"""Linux system calls that Python's standard library lacks, through ctypes and the C library."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine()

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 28, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
LOCKED_SECUREBITS = 0b11101111  # NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE with their locks, KEEP_CAPS locked off
CAPABILITY_VERSION_3 = 0x20080522

NUMBERS = {
    "x86_64": {"capset": 126, "capget": 125, "pivot_root": 155},
    "aarch64": {"capset": 91, "capget": 90, "pivot_root": 41},
}.get(MACHINE, {})
MOUNT_SETATTR, LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 442, 444, 445, 446


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def check(result: int, call: str) -> int:
    """Return `result`. Raises OSError with the C library's errno where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> int:
    """Call the C library's prctl with up to four numbers; an error is an OSError."""
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return check(LIBC.prctl(option, *padded), f"prctl {option}")


def syscall(number: int, name: str, *arguments: object) -> int:
    """Call the system call of a number; an error is an OSError with its name."""
    return check(LIBC.syscall(ctypes.c_long(number), *arguments), name)


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` (CLONE_NEW*). Raises OSError."""
    check(LIBC.unshare(flags), "unshare")


def has_capabilities() -> bool:
    """Return whether the process has any effective or permitted capability. Raises OSError."""
    sets = (_Sets * 2)()
    syscall(NUMBERS["capget"], "capget", ctypes.byref(_Header(CAPABILITY_VERSION_3, 0)), ctypes.byref(sets))
    return any(s.effective or s.permitted for s in sets)


def drop_bounding_set() -> None:
    """Empty the bounding set, and lock the rules by which uid 0 or an exec would gain capabilities.

    Without CAP_SETPCAP both stay; no_new_privs makes them of no use.
    """
    try:
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)
    except OSError:  # past the last capability, or without CAP_SETPCAP
        pass
    with suppress(OSError):  # without CAP_SETPCAP
        prctl(PR_SET_SECUREBITS, LOCKED_SECUREBITS)


def drop_capabilities() -> None:
    """Empty the ambient, permitted, effective and inheritable sets. Raises OSError."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    sets = (_Sets * 2)()
    syscall(NUMBERS["capset"], "capset", ctypes.byref(_Header(CAPABILITY_VERSION_3, 0)), ctypes.byref(sets))
    if has_capabilities():
        raise OSError("capabilities remain after capset")
