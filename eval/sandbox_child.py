"""The inside of the sandbox: shut the doors, then run one program. Started by sandbox.py as `python -I -B <this file>`.

Reads {"program", "directory", "token", limits...} as JSON from stdin and writes one line of JSON to stdout,
`{"token", "error", "layers"}`, where `error` is empty when the program ran to its end. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

FORBIDDEN = (  # audit events that start processes, reach other processes, or leave the machine
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.spawn"),
    *(
        "subprocess.Popen",
        "os.kill",
        "os.killpg",
        "ctypes.dlsym",
        "ctypes.call_function",
        "ctypes.cdata",
        "sys.addaudithook",
    ),
)
WRITES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
)


class _MountAttributes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns"))


def isolate(directory: str) -> list[str]:
    """Leave the network and make every file system but `directory` read-only, as far as the system allows.

    Returns the layers that hold, of "network" and "files"; none of them outside Linux or where namespaces are refused.
    """
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    user = 0 if os.geteuid() == 0 else CLONE_NEWUSER
    if libc.unshare(user | CLONE_NEWNET | CLONE_NEWNS) != 0:
        return ["network"] if libc.unshare(user | CLONE_NEWNET) == 0 else []

    def read_only(path: str, on: bool, recursive: bool) -> bool:
        change = _MountAttributes(MOUNT_ATTR_RDONLY if on else 0, 0 if on else MOUNT_ATTR_RDONLY, 0, 0)
        flags = AT_RECURSIVE if recursive else 0
        where = path.encode()
        return libc.syscall(MOUNT_SETATTR, AT_FDCWD, where, flags, ctypes.byref(change), ctypes.sizeof(change)) == 0

    here = directory.encode()
    closed = (
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(here, here, None, MS_BIND, None) == 0
        and read_only("/", True, recursive=True)
        and read_only(directory, False, recursive=False)
    )
    return ["network", "files"] if closed else ["network"]


def limit(cpu_seconds: int, memory: int, file_bytes: int) -> None:
    """Set the process's limits, which it cannot raise again: CPU time, address space, file size, processes."""
    for name, value in (
        ("RLIMIT_CPU", cpu_seconds),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", file_bytes),
        ("RLIMIT_NPROC", 0),  # does not bind root, whom the audit hook stops
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 64),
    ):
        if hasattr(resource, name):
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (ValueError, OSError):  # a lower hard limit is already set, or macOS has no such limit
                continue


def guard(directory: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook: no process, no signal, no socket, no native call, no write outside `directory`."""
    root = os.path.realpath(directory)
    inside, real, fspath, fsdecode = root + os.sep, os.path.realpath, os.fspath, os.fsdecode
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    separator = os.sep

    def allowed(path: Any) -> bool:
        if isinstance(path, int):
            return True  # an open descriptor, or a missing dir_fd
        place = real(fsdecode(fspath(path)))
        return place == root or place.startswith(inside) or place == separator + "dev/null".replace("/", separator)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket.") or event in FORBIDDEN:
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing and not allowed(arguments[0]):
            raise PermissionError(f"writing {arguments[0]} is not allowed in the sandbox")
        if event in WRITES and not all(allowed(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))):
            raise PermissionError(f"{event} outside the working directory is not allowed in the sandbox")

    return hook


def main() -> None:
    """Run the program of the request and report; the process ends here whatever the program left behind."""
    request = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    layers = isolate(request["directory"])
    os.chdir(request["directory"])  # after the mounts, so that the writable one is the current one
    answer = {"token": request["token"], "error": "", "layers": layers}
    passed = json.dumps(answer).encode()
    write, leave, dumps = os.write, os._exit, json.dumps  # the program may rebind these names
    code = compile_or_report(request["program"], answer, report)
    limit(request["cpu_seconds"], request["memory"], request["file_bytes"])
    sys.addaudithook(guard(request["directory"]))
    try:
        exec(code, {})
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error!s:.200}"
        write(report, dumps(answer).encode())
        leave(0)
    write(report, passed)
    leave(0)


def compile_or_report(program: str, answer: dict[str, Any], report: int) -> Any:
    """Compile the program; one that is no Python at all ends the process with its error."""
    try:
        return compile(program, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        os.write(report, json.dumps({**answer, "error": f"{type(error).__name__}: {error!s:.200}"}).encode())
        os._exit(0)


if __name__ == "__main__":
    main()
