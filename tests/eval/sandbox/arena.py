"""Runs the hostile programs against canaries of its own and prints one JSON line per program.

Started by `run_arena`, under the identity and the refusals of a combination, as `python arena.py FOLDER MODE`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from eval.sandbox import supervisor  # noqa: E402
from eval.sandbox.isolation.limits import Limits  # noqa: E402
from eval.sandbox.verdict import Program  # noqa: E402
from tests.eval.sandbox.hostile import GOOD, HOSTILE, Hostile  # noqa: E402

LIMITS = Limits(cpu_seconds=1, wall_seconds=1.0)
STALL_SECONDS = LIMITS.wall_seconds + 15.0
"""A program that holds the grading longer than this has stalled it; setting up takes long on a busy machine."""
LEFTOVERS = (Path("/dev/shm/sandbox_escape"), Path("/var/tmp/sandbox_escape"))
IPC_CREAT, IPC_RMID = 0o1000, 0


class Canaries:
    """Canaries: objects that programs must not reach, with the state that shows a contact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret, self.target, self.database = folder / "secret", folder / "target", folder / "database"
        self.secret.write_text("secret")
        self.target.write_text("target")
        (folder / "planted.py").write_text("")
        (folder / "home").mkdir()
        (folder / "home" / ".netrc").write_text("secret")
        connection = sqlite3.connect(self.database)
        connection.execute("create table t (x)")
        connection.commit()
        connection.close()
        for path in (self.secret, self.target, self.database):
            path.chmod(0o666)
        folder.chmod(0o777)
        self.contacts: list[str] = []
        self._listeners = [self._listen(*address) for address in self._addresses()]
        self.port = self._listeners[0].getsockname()[1]
        self._start_bystander()
        self._memory = ctypes.CDLL(None).shmget(0, 4096, IPC_CREAT | 0o666)
        self._files = self._file_state()

    def _start_bystander(self) -> None:
        self.bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        self._state = self._bystander_state()

    def restart_bystander(self) -> None:
        """Start a new bystander where an attack has killed the last one."""
        if self.bystander.poll() is not None:
            self._start_bystander()

    def _addresses(self) -> list[tuple[socket.AddressFamily, socket.SocketKind, Any]]:
        self.abstract = f"sandbox-canary-{os.getpid()}"
        unix, datagram = str(self.folder / "socket"), f"\0{self.abstract}_datagram"
        return [
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, unix),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}"),
            (socket.AF_UNIX, socket.SOCK_DGRAM, datagram),
        ]

    def _listen(self, family: socket.AddressFamily, kind: socket.SocketKind, address: Any) -> socket.socket:
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()

        def wait() -> None:
            with suppress(OSError):
                while True:
                    if kind == socket.SOCK_STREAM:
                        listener.accept()[0].close()
                    else:
                        listener.recv(100)
                    self.contacts.append(str(address))

        threading.Thread(target=wait, daemon=True).start()
        return listener

    def names(self) -> Mapping[str, Any]:
        """Return the values of the names in the programs."""
        home = str(self.folder / "home")
        return {
            "secret": str(self.secret), "target": str(self.target), "database": str(self.database),
            "folder": str(self.folder), "home": home, "entries": len(os.listdir(home)), "project": str(ROOT),
            "port": self.port, "unix": str(self.folder / "socket"), "abstract": self.abstract, "grader": os.getpid(),
            "bystander": self.bystander.pid, "shared": 0x5EAD,
        }  # fmt: skip

    def _bystander_state(self) -> tuple[Any, ...]:
        pid = self.bystander.pid
        if self.bystander.poll() is not None:
            return ("ended", self.bystander.poll())
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T",
            resource.prlimit(pid, resource.RLIMIT_NOFILE),
            os.getpriority(os.PRIO_PROCESS, pid),
            os.getpriority(os.PRIO_PROCESS, os.getpid()),
            os.sched_getaffinity(pid),
            os.sched_getscheduler(pid),
        )

    def _file_state(self) -> list[tuple[Any, ...]]:
        paths = [p for p in sorted(self.folder.rglob("*")) if not p.name.endswith("-journal")]
        stats = [(str(p), p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_nlink) for p in paths]
        return [*stats, *((str(p), p.exists()) for p in LEFTOVERS)]

    def damage(self) -> list[str]:
        """Return what programs have reached or changed since the last call."""
        found = []
        state, files, contacts = self._bystander_state(), self._file_state(), self.contacts
        if state != self._state:
            found.append(f"bystander or grader: {state}")
        if files != self._files:
            found.append(f"files: {sorted({*files} ^ {*self._files})[:3]}")
        if contacts:
            found.append(f"contacts: {contacts}")
        self._state, self._files, self.contacts = state, files, []
        return found

    def close(self) -> None:
        """End what was started and created."""
        self.bystander.kill()
        self.bystander.wait()
        ctypes.CDLL(None).shmctl(self._memory, IPC_RMID, None)
        for listener in self._listeners:
            listener.close()
        for path in LEFTOVERS:
            with suppress(OSError):
                path.unlink()


@contextmanager
def canaries(folder: Path) -> Iterator[Canaries]:
    """Set canaries up in a folder and remove them."""
    made = Canaries(folder)
    try:
        yield made
    finally:
        made.close()


def descendants() -> set[int]:
    """Return the processes of this session or below this process, without this one and the bystander."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found, changed = {os.getpid()}, True
    while changed:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        changed = bool(more)
    return found - {os.getpid()}


def run(hostile: Hostile, names: Mapping[str, Any]) -> dict[str, Any]:
    """Run one program and return its verdict and time."""
    limits = Limits() if hostile.family == "good" else LIMITS
    started = time.monotonic()
    verdict = supervisor.run_program(Program(hostile.code.format(**names), hostile.tests), limits)
    return {
        "family": hostile.family,
        "name": hostile.name,
        "status": verdict.status,
        "detail": verdict.detail,
        "seconds": round(time.monotonic() - started, 2),
    }


def main(folder: str, mode: str, workers: str) -> None:
    """Run all programs in a mode ("best": the strongest) and print a line for each, then one for damage."""
    os.environ["SANDBOX_SECRET"] = "secret"
    if mode != "best":
        supervisor.MODES = (mode,)
    chosen = supervisor.containment()
    print(json.dumps({"mode": chosen.mode, "layers": chosen.layers, "refused": chosen.refused}), flush=True)
    with canaries(Path(folder)) as made, ThreadPoolExecutor(int(workers)) as pool:
        names = made.names()
        for result in pool.map(lambda hostile: run(hostile, names), [*GOOD, *HOSTILE]):
            print(json.dumps(result), flush=True)
        left = descendants() - {made.bystander.pid}
        damage = made.damage() + ([f"processes left: {left}"] if left else [])
        print(json.dumps({"damage": damage}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(*sys.argv[1:])
