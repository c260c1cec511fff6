"""Seccomp deny list of one program: no processes, sockets, mounts, tracing, signals to others, or kernel interfaces.

A small BPF assembler, because pyseccomp, the binding on the package index, needs the shared library libseccomp and has
had no release since 2021. Threads stay possible: clone with CLONE_THREAD is allowed, clone3 reports ENOSYS, so that the
C library falls back to clone. Calls newer than the list report ENOSYS. A foreign architecture or the x32 interface
kills the process. Reference: https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable

from eval.sandbox.isolation.syscalls import MACHINE, prctl

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH number and column in the tables below."""
LAST_KNOWN = 456
X32_BIT = 0x40000000
CLONE_THREAD = 0x00010000

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
PR_SET_SECCOMP, FILTER_MODE = 22, 2

# fmt: off
DENIED: dict[str, tuple[int, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154), "socket": (41, 198), "connect": (42, 203),
    "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendmsg": (46, 211),
    "sendmmsg": (307, 269), "recvmsg": (47, 212), "recvmmsg": (299, 243), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "syslog": (103, 116), "personality": (135, 92), "modify_ldt": (154, None), "lookup_dcookie": (212, 18),
    "vhangup": (153, 58), "uselib": (134, None), "nfsservctl": (180, 42), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182), "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450), "get_mempolicy": (239, 236), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sync": (162, 81), "syncfs": (306, 267),
}
CONDITIONAL: dict[str, tuple[int, int]] = {
    "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "prctl": (157, 167),
    "clone": (56, 220), "sendto": (44, 206), "ioctl": (16, 29), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "fcntl": (72, 25),
}
ON_THE_MACHINES_FILES: dict[str, tuple[int, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fchmodat2": (452, 452),
}
# fmt: on
"""System call numbers by name, on x86_64 and aarch64: calls refused always, by their arguments, and where the process
sees the machine's root, whose owners, modes, times and attributes Landlock does not protect."""

PRCTL_DENIED = (1, 4, 35, 0x59616D61)  # PDEATHSIG, DUMPABLE, MM, PTRACER
IOCTL_DENIED = (0x5412, 0x541C, 0x540E, 0x5410, 0x8901, 0x8902)  # TIOCSTI, TIOCLINUX, TIOCSCTTY, TIOCSPGRP, *SETOWN
FCNTL_DENIED = (8, 10, 15, 1024, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX (signals), F_SETLEASE, F_NOTIFY

Instruction = tuple[int, int, int, int]


class _Filter(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter)))


def deny_list(machine: str, pid: int, has_own_root: bool) -> list[Instruction]:
    """Return the filter as BPF instructions (code, jump if true, jump if false, constant).

    Args:
        machine: x86_64 or aarch64, as platform.machine() spells them.
        pid: the process's own id, to which it may send signals.
        has_own_root: the process sees no file of the machine that it could change.
    """
    architecture, column = ARCHITECTURES[machine]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_GREATER_EQUAL, 0, 1, X32_BIT),
        (_RETURN, 0, 0, _KILL),
        (_GREATER_EQUAL, 0, 1, LAST_KNOWN + 1),
        _error(errno.ENOSYS),
    ]

    def rule(name: str, body: list[Instruction]) -> None:
        number = CONDITIONAL[name][column]
        code.extend([(_EQUAL, 0, len(body), number), *body])

    rule("clone3", [_error(errno.ENOSYS)])
    denied = DENIED if has_own_root else {**DENIED, **ON_THE_MACHINES_FILES}
    for numbers in denied.values():
        if numbers[column] is not None:
            code.extend([(_EQUAL, 0, 1, numbers[column] or 0), _error(errno.EPERM)])
    rule("clone", [_low(0), (_ANY_BIT, 1, 0, CLONE_THREAD), _error(errno.EPERM), (_RETURN, 0, 0, _ALLOW)])
    for name in ("kill", "tgkill"):
        rule(name, _only(0, (pid,)))
    for name in ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        rule(name, _only(0, (0, pid)))
    rule("prctl", _never(0, PRCTL_DENIED))
    rule("ioctl", _never(1, IOCTL_DENIED))
    rule("fcntl", _never(1, FCNTL_DENIED))
    rule(
        "sendto",
        [_low(4), (_EQUAL, 0, 2, 0), _high(4), (_EQUAL, 1, 0, 0), _error(errno.EPERM), (_RETURN, 0, 0, _ALLOW)],
    )
    return [*code, (_RETURN, 0, 0, _ALLOW)]


def _error(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | number)


def _low(argument: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)


def _high(argument: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * argument + 4)


def _only(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Allow the call where the low word of an argument is one of `values`, else EPERM."""
    allowed = [part for value in values for part in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
    return [_low(argument), *allowed, _error(errno.EPERM)]


def _never(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Refuse the call with EPERM where the low word of an argument is one of `values`, else allow it."""
    refused = [part for value in values for part in ((_EQUAL, 0, 1, value), _error(errno.EPERM))]
    return [_low(argument), *refused, (_RETURN, 0, 0, _ALLOW)]


def install(pid: int, has_own_root: bool) -> None:
    """Bind this process to the deny list for good; no_new_privs must be set. Raises OSError."""
    if MACHINE not in ARCHITECTURES:
        raise OSError(f"the seccomp deny list has no numbers for {MACHINE}")
    instructions = deny_list(MACHINE, pid, has_own_root)
    array = (_Filter * len(instructions))(*(_Filter(*one) for one in instructions))
    program = _Program(len(instructions), array)
    prctl(PR_SET_SECCOMP, FILTER_MODE, ctypes.addressof(program))
