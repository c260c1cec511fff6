"""Entry point inside the sandbox: sets the layers up and forks the test process and the program's process.

Started by supervisor.py as `python -S -s -P -B child.py`. Standard input holds two messages: the program with its
limits, and, read after the program's process has been forked, the tests. Standard output takes one report as JSON:
`{"status", "detail", "layers"}`. Standard library only.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import json  # noqa: E402
import signal  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import NoReturn  # noqa: E402

from eval.sandbox import program, test_process  # noqa: E402
from eval.sandbox.connection import ConnectionLostError, read_message, write_message  # noqa: E402
from eval.sandbox.isolation.confinement import confine, die_with_parent  # noqa: E402
from eval.sandbox.isolation.limits import Limits  # noqa: E402
from eval.sandbox.isolation.namespaces import NEWNS, NEWPID, enter_view, leave_namespaces, mount_work_folder  # noqa: E402
from eval.sandbox.isolation.syscalls import unshare  # noqa: E402
from eval.sandbox.view import View  # noqa: E402

REQUEST_BYTES = 256 << 20
STARTED = b" "
"""Written before the report, so that a sandbox that never started is no verdict on a program."""


def report(status: str, detail: str, layers: list[str]) -> NoReturn:
    """Write the verdict and end the process, and with it every process of its PID namespace."""
    os.write(1, json.dumps({"status": status, "detail": detail[: program.MAX_DETAIL], "layers": layers}).encode())
    os._exit(0)


@dataclass(frozen=True)
class Request:
    """The first message of the supervisor.

    Attributes:
        mode: containment: bubblewrap, namespaces, landlock, or weak.
        code: source code of the program.
        seed: seed of the `random` module.
        limits: resource limits.
        view: file system view.
    """

    mode: str
    code: str
    seed: int
    limits: Limits
    view: View

    @property
    def has_own_root(self) -> bool:
        """True where the mode replaces the root folder."""
        return self.mode in ("bubblewrap", "namespaces")

    @property
    def is_weak(self) -> bool:
        """True where the user allowed containment by limits alone."""
        return self.mode == "weak"


def _read_request() -> Request:
    message = read_message(0, REQUEST_BYTES)
    assert isinstance(message, dict)
    view = View(*(tuple(part) for part in message["view"]))
    return Request(message["mode"], message["program"], message["seed"], Limits(**message["limits"]), view)


def main() -> None:
    """Run one request; the process ends here."""
    die_with_parent()
    request = _read_request()
    sys.path[:] = request.view.search_path
    try:
        if request.mode == "namespaces":
            _enter_namespaces(request.view, request.limits.file_bytes)
        _run(request)
    except OSError as error:
        report("unavailable", f"{request.mode}: {error}", [])


def _enter_namespaces(view: View, file_bytes: int) -> None:
    """Return in the first process of new namespaces; the calling process waits for it and ends."""
    leave_namespaces()
    pid = os.fork()
    if pid:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(pid, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    die_with_parent()
    enter_view(view, file_bytes)


def _run(request: Request) -> None:
    mode, limits = request.mode, request.limits
    layers = {"bubblewrap": ["bubblewrap", "namespaces"], "namespaces": ["namespaces"]}.get(mode, [])
    from_program, to_tests = os.pipe()
    from_tests, to_program = os.pipe()
    if request.has_own_root:
        unshare(NEWPID | NEWNS)  # the program's process sees neither the test process nor any other
        if mode == "bubblewrap":
            mount_work_folder(limits.file_bytes)  # bubblewrap's own has no limit on the number of files
    else:
        os.chdir("/")
    pid = os.fork()
    if pid == 0:
        _become_program(request, from_tests, to_tests)
    os.close(to_tests)
    os.close(from_tests)

    def stop(*_: object) -> NoReturn:
        report("timed out", f"still running after {limits.wall_seconds:g} s", layers)

    signal.signal(signal.SIGALRM, stop)
    layers += confine(request.view, limits, request.has_own_root, request.is_weak)
    tests = read_message(0, REQUEST_BYTES)
    assert isinstance(tests, dict)
    try:
        started = read_message(from_program)
        assert isinstance(started, list)
        if started != ["confined", layers[-len(started[1]) :]]:
            report("unavailable", f"{mode}: the program's process is not confined: {started}", layers)
        os.write(1, STARTED)
        signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)
        status, detail = test_process.run_tests(from_program, to_program, **tests)
    except ConnectionLostError as error:
        os.close(from_program)
        os.close(to_program)
        status, detail = test_process.exit_reason(pid, limits.cpu_seconds)
        if detail.endswith("(exit code 0)") and "left" not in str(error):
            detail = str(error)
    report(status, detail, layers)


def _become_program(request: Request, incoming: int, outgoing: int) -> NoReturn:
    """Confine this process and run the program in it, with no descriptor but the two of the connection."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.dup2(incoming, 60)
    os.dup2(outgoing, 61)
    os.closerange(3, 60)
    os.closerange(62, 256)
    try:
        layers = confine(request.view, request.limits, request.has_own_root, request.is_weak)
        message = ["confined", layers]
    except OSError as error:
        message = ["refused", [str(error)]]
    write_message(61, message)
    if message[0] == "refused":
        os._exit(0)
    program.add_site_builtins()
    program.run_program(request.code, request.seed, 60, 61)
    os._exit(0)


if __name__ == "__main__":
    main()
