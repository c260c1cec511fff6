"""Identities and refusals under which the hostile programs run, and a launcher for each.

The launcher gives up in one process what the combination lacks, then executes the arena: CAP_SYS_ADMIN, uid 0, or the
system calls that container runtimes refuse (namespaces and mounts).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from eval.sandbox.isolation import (  # noqa: E402
    namespaces,
    seccomp,
    syscalls,
)

CAP_SYS_ADMIN = 21
NEW_NAMESPACES = 0x7E020000 & ~0x00010000
REFUSED = ("unshare", "setns", "mount", "umount2", "pivot_root", "open_tree", "move_mount", "fsopen", "fsmount")


@dataclass(frozen=True)
class Combination:
    """Identity of the grading process and what the machine gives it.

    Attributes:
        identity: root, root without CAP_SYS_ADMIN, or uid 65534.
        mode: mode of the sandbox that is forced; "best" where the sandbox chooses.
        refused: namespaces and mounts are refused, as in a container.
    """

    identity: str
    mode: str
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.identity}, {'namespaces refused' if self.refused else self.mode}"

    def obstacle(self) -> str | None:
        """Return why this machine cannot show the combination; None where it can."""
        if sys.platform != "linux":
            return "needs Linux"
        if self.identity != "uid 65534" and os.geteuid() != 0:
            return "needs root"
        if self.identity == "uid 65534" and os.geteuid() not in (0, 65534):
            return "needs root, to become uid 65534"
        if self.mode == "bubblewrap" and shutil.which("bwrap") is None:
            return "bubblewrap is not installed"
        if not self.refused:
            probe = [sys.executable, "-c", "import os, ctypes; os._exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"]
            if subprocess.run(probe).returncode:
                return "this machine refuses user namespaces"
        return None


IDENTITIES = ("root", "root without CAP_SYS_ADMIN", "uid 65534")
COMBINATIONS = [
    Combination(identity, mode, mode == "best")
    for identity in IDENTITIES
    for mode in ("bubblewrap", "namespaces", "best")
]


def run_arena(combination: Combination, folder: Path, workers: int = 2) -> list[dict[str, Any]]:
    """Run all hostile programs under a combination and return the arena's lines.

    Args:
        combination: identity and refusals.
        folder: empty folder for canaries, which every user can reach.
        workers: programs at a time.
    """
    command = [sys.executable, __file__, combination.identity, str(int(combination.refused)), str(folder)]
    done = subprocess.run([*command, combination.mode, str(workers)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{combination}: {done.stderr[-6000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _refuse_namespaces() -> None:
    """Install the filter of a container runtime: no new namespaces, no mounts."""
    architecture, column = seccomp.ARCHITECTURES[syscalls.MACHINE]
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x7FFF0000), (0x20, 0, 0, 0)]
    for number in (seccomp.DENIED[name][column] or 0 for name in REFUSED):
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | errno.EPERM)]
    code += [(0x15, 0, 1, 435), (0x06, 0, 0, 0x50000 | errno.ENOSYS)]
    clone = seccomp.CONDITIONAL["clone"][column]
    code += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, NEW_NAMESPACES), (0x06, 0, 0, 0x50000 | errno.EPERM)]
    code += [(0x06, 0, 0, 0x7FFF0000)]
    array = (seccomp._Filter * len(code))(*(seccomp._Filter(*one) for one in code))
    program = seccomp._Program(len(code), array)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    syscalls.prctl(seccomp.PR_SET_SECCOMP, seccomp.FILTER_MODE, ctypes.addressof(program))


def _show_python() -> str:
    """Bind this interpreter's installation where every user can reach it, for this process alone."""
    if all(parent.stat().st_mode & 1 for parent in Path(sys.base_prefix, "lib").parents):
        return getattr(sys, "_base_executable", sys.executable)
    syscalls.unshare(namespaces.NEWNS)
    namespaces.mount("none", "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.mount("none", "/mnt", "tmpfs", 0)
    target = Path("/mnt/python")
    target.mkdir()
    namespaces.mount(sys.base_prefix, str(target), None, namespaces.MS_BIND | namespaces.MS_REC)
    return str(target / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")


def _launch(identity: str, refused: str, folder: str, mode: str, workers: str) -> None:
    python = sys.executable
    if os.geteuid() == 0:
        python = _show_python()
    if identity == "uid 65534" and os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    elif identity == "root without CAP_SYS_ADMIN":
        syscalls.prctl(syscalls.PR_CAPBSET_DROP, CAP_SYS_ADMIN)
    if refused == "1":
        _refuse_namespaces()
    environment = {"PATH": os.environ["PATH"], "HOME": folder, "SANDBOX_SECRET": "secret"}
    environment["LD_LIBRARY_PATH"] = str(Path(python).parent.parent / "lib")  # a moved Python's own library
    arena = str(Path(__file__).with_name("arena.py"))
    os.execve(python, [python, "-B", arena, folder, mode, workers], environment)


if __name__ == "__main__":
    _launch(*sys.argv[1:])
