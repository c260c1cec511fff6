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
from typing import Any, NoReturn  # noqa: E402

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


def main() -> None:
    """Run one request; the process ends here."""
    die_with_parent()
    request = read_message(0, REQUEST_BYTES)
    view = View(*(tuple(part) for part in request["view"]))
    sys.path[:] = view.search_path
    mode = request["mode"]
    try:
        if mode == "namespaces":
            _enter_namespaces(view, request)
        _run(request, view, mode)
    except OSError as error:
        report("unavailable", f"{mode}: {error}", [])


def _enter_namespaces(view: View, request: dict[str, Any]) -> None:
    """Return in the first process of new namespaces; the calling process waits for it and ends."""
    leave_namespaces()
    pid = os.fork()
    if pid:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(pid, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    die_with_parent()
    enter_view(view, request["limits"]["file_bytes"])


def _run(request: dict[str, Any], view: View, mode: str) -> None:
    limits = Limits(**request["limits"])
    has_own_root, weak = mode in ("bubblewrap", "namespaces"), mode == "weak"
    layers = {"bubblewrap": ["bubblewrap", "namespaces"], "namespaces": ["namespaces"]}.get(mode, [])
    from_program, to_tests = os.pipe()
    from_tests, to_program = os.pipe()
    if has_own_root:
        unshare(NEWPID | NEWNS)  # the program's process sees neither the test process nor any other
        if mode == "bubblewrap":
            mount_work_folder(limits.file_bytes)  # bubblewrap's own has no limit on the number of files
    else:
        os.chdir("/")
    pid = os.fork()
    if pid == 0:
        _become_program(request, view, limits, has_own_root, weak, from_tests, to_tests)
    os.close(to_tests)
    os.close(from_tests)

    def stop(*_: Any) -> NoReturn:
        report("timed out", f"still running after {limits.wall_seconds:g} s", layers)

    signal.signal(signal.SIGALRM, stop)
    layers += confine(view, limits, has_own_root, weak)
    tests = read_message(0, REQUEST_BYTES)
    try:
        started = read_message(from_program)
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


def _become_program(
    request: dict[str, Any], view: View, limits: Limits, has_own_root: bool, weak: bool, incoming: int, outgoing: int
) -> NoReturn:
    """Confine this process and run the program in it, with no descriptor but the two of the connection."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.dup2(incoming, 60)
    os.dup2(outgoing, 61)
    os.closerange(3, 60)
    os.closerange(62, 256)
    try:
        message = ["confined", confine(view, limits, has_own_root, weak)]
    except OSError as error:
        message = ["refused", [str(error)]]
    write_message(61, message)
    if message[0] == "refused":
        os._exit(0)
    program.add_site_builtins()
    code, seed = request.pop("program"), request["seed"]
    program.run_program(code, seed, 60, 61)
    os._exit(0)


if __name__ == "__main__":
    main()
