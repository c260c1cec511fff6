"""Resource limits of one program."""

from __future__ import annotations

import resource
from dataclasses import dataclass

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Resources that one program may use.

    The public harness gives 3 s of wall-clock time; CPU time depends less on other load. The slowest reference solution
    (MBPP 123) takes 3 s of CPU time, hence 10 s, and a wall-clock limit for programs that sleep.

    Attributes:
        cpu_seconds: CPU time of program and tests, each.
        wall_seconds: wall-clock time of program and tests together.
        memory: address space in bytes.
        file_bytes: size in bytes of the writable tmpfs, and of each file there.
        tasks: processes and threads of the program's user, in its user namespace where it has one.
    """

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 2 << 30
    file_bytes: int = 16 * MEBIBYTE
    tasks: int = 256


def set_limits(limits: Limits, writes: bool) -> None:
    """Set soft and hard limits of this process; a lower hard limit that is already set stays.

    Args:
        limits: CPU time, memory and file size.
        writes: whether files may hold bytes at all.
    """
    values = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file_bytes if writes else 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": limits.tasks,
        "RLIMIT_SIGPENDING": 1024,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in values.items():
        number = getattr(resource, name, None)
        if number is None:  # macOS lacks some
            continue
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            if name != "RLIMIT_AS":
                raise
