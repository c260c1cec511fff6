"""Starts one process tree per program, reads its report within a time limit, and ends the tree.

Importing this module starts nothing.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from common.errors import EvaluationError
from common.hardware import usable_cores
from eval.sandbox.connection import pack_message
from eval.sandbox.isolation.limits import Limits
from eval.sandbox.isolation.namespaces import NOBODY
from eval.sandbox.verdict import MAX_REPORT, Program, Report, Verdict, parse_report
from eval.sandbox.view import WORK, View, is_public, view_of

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = Path(__file__).with_name("child.py")
STARTED = b" "
"""Output of the test process when both processes are confined (child.py)."""
MODES: tuple[str, ...] = ("bubblewrap", "namespaces", "landlock")
"""Strongest first."""
GRACE_SECONDS = 20.0
"""Time beyond the wall-clock limit for setting up and for a report, on a busy machine."""
MAX_SEED = (1 << 32) - 1
DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Containment:
    """Layers that this machine gives.

    Attributes:
        mode: bubblewrap, namespaces, landlock, or weak.
        layers: names of the layers, as each program's report must repeat them.
        refused: why stronger modes are unavailable, by mode.
    """

    mode: str
    layers: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    def __str__(self) -> str:
        return ", ".join(self.layers)


def _interpreter() -> str:
    return getattr(sys, "_base_executable", None) or sys.executable


def _environment(seed: int) -> dict[str, str]:
    libraries = os.environ.get("LD_LIBRARY_PATH")  # some installations of Python need it to start
    return {
        **({"LD_LIBRARY_PATH": libraries} if libraries else {}),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": os.defpath,
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": str(seed & MAX_SEED),
    }


def _execute(program: Program, limits: Limits, mode: str, seed: int) -> tuple[Report | None, int]:
    """Run one program in a mode; return its report, if there is a readable one, and the exit code of the tree.

    Raises EvaluationError where no process can be started.
    """
    view = _view()
    user = None
    command = [_interpreter(), "-S", "-s", "-P", "-B", str(CHILD)]
    if mode == "bubblewrap":
        from eval.sandbox.isolation import bubblewrap

        command = bubblewrap.wrap(command, view, limits.file_bytes, ROOT)
        user = NOBODY if os.geteuid() == 0 else None
    elif mode != "namespaces":
        limits = replace(limits, tasks=limits.tasks + _tasks_of_user())
    first = {"mode": mode, "program": program.code, "seed": seed, "limits": asdict(limits)}
    first["view"] = [view.folders, view.masks, view.packages, view.search_path]
    second = {"tests": program.tests, "prelude": program.prelude, "entry_points": program.entry_points, "seed": seed}
    request = pack_message(first) + pack_message(second)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(seed),
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
    except OSError as error:
        raise EvaluationError(f"The sandbox could not start {command[0]}: {error}.") from error
    with suppress(OSError):  # in a memory shortage the program goes first
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        output = _exchange(process, request, limits.wall_seconds + GRACE_SECONDS)
        report = parse_report(output)
        if report is None:
            _await_exit(process.pid, 1.0)  # its own exit code tells why there is none
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    if report is None and not output.startswith(STARTED):
        report = Report("unavailable", f"it ended with exit code {process.returncode} before the program started", ())
    return report, process.returncode


def _await_exit(pid: int, seconds: float) -> None:
    """Wait until a process has ended, and leave it unreaped, so that its number stays its own."""
    deadline = time.monotonic() + seconds
    while hasattr(os, "waitid") and time.monotonic() < deadline:  # macOS lacks it before Python 3.13
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.02)


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """Send the request and return at most 64 KiB and one byte of output, within `seconds`."""
    deadline = time.monotonic() + seconds
    assert process.stdin is not None
    assert process.stdout is not None
    rest, output = memoryview(request), bytearray()
    with process.stdin as stdin, process.stdout as stdout, selectors.DefaultSelector() as selector:
        os.set_blocking(stdin.fileno(), False)
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        while len(output) <= MAX_REPORT:
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                break
            for key, _ in ready:
                if key.fileobj is stdin:
                    try:
                        rest = rest[os.write(stdin.fileno(), rest) :]
                    except BrokenPipeError:
                        rest = memoryview(b"")
                    if not rest:
                        selector.unregister(stdin)
                else:
                    part = os.read(stdout.fileno(), MAX_REPORT + 1 - len(output))
                    if not part:
                        return bytes(output)
                    output += part
    return bytes(output)


@lru_cache(maxsize=1)
def _tasks_of_user() -> int:
    """Return processes and threads of the user that programs run as, and room for those that it starts meanwhile.

    Only user namespaces count the tasks of a program by themselves.
    """
    users = {os.geteuid(), NOBODY} if os.geteuid() == 0 else {os.geteuid()}
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid in users:
                count += len(os.listdir(process / "task"))
    return count + 4096


@lru_cache(maxsize=1)
def _view() -> View:
    return view_of(sys.prefix, sys.base_prefix)


_probe_lock = threading.Lock()
_containments: dict[bool, Containment] = {}


def containment(weak: bool = False) -> Containment:
    """Return the strongest containment that this machine gives, found by running an empty program in each mode.

    Args:
        weak: accept resource limits, and whichever single layers the machine gives, where all modes are refused.

    Raises:
        EvaluationError: the machine gives no mode, and `weak` is not set.
    """
    with _probe_lock:
        if weak not in _containments:
            _containments[weak] = _probe((*MODES, "weak") if weak else MODES)
        return _containments[weak]


def _probe_program() -> str:
    """Return a program that reads the standard library and every package that programs may import."""
    names = [Path(path).stem for path in _view().packages if not path.endswith(".libs")]
    read = "open(importlib.util.find_spec(name).origin, 'rb').read(1)"
    return f"import asyncio, colorsys, importlib.util, wave\nfor name in {names!r}: {read}"


def _probe(modes: Sequence[str]) -> Containment:
    refused: dict[str, str] = {}
    for mode in modes:
        if mode == "bubblewrap":
            from shutil import which

            if which("bwrap") is None:
                refused[mode] = "bwrap is not installed"
                continue
            below = [path for path in (*_view().search_path, str(ROOT)) if path.startswith(f"{WORK}/")]
            if below:
                refused[mode] = f"{below[0]} lies below {WORK}, which bubblewrap replaces"
                continue
            if os.geteuid() == 0 and not is_public(_view()):
                refused[mode] = f"programs would run as root, for no other user can read {sys.base_prefix} and {ROOT}"
                continue
        if mode != "weak" and sys.platform != "linux":
            refused[mode] = "needs Linux"
            continue
        report, code = _execute(Program(_probe_program()), Limits(), mode, 0)
        if report is not None and report.status == "passed":
            return Containment(mode, report.layers, refused)
        refused[mode] = report.detail.removeprefix(f"{mode}: ") if report else f"ended with exit code {code}"
    reasons = "; ".join(f"{mode}: {why}" for mode, why in refused.items())
    raise EvaluationError(
        f"This machine gives no sandbox for model-written code ({reasons}); install bubblewrap, allow user namespaces, "
        "or run with --sandbox weak, which has resource limits only."
    )


@dataclass(frozen=True)
class SandboxSettings:
    """Settings of a run's sandbox.

    Attributes:
        weak: accept resource limits alone.
        seed: hash seed of programs and seed of their `random` module.
        limits: resources of one program.
    """

    weak: bool = False
    seed: int = 0
    limits: Limits = field(default_factory=Limits)


def run_program(program: Program | str, limits: Limits = DEFAULT_LIMITS, weak: bool = False, seed: int = 0) -> Verdict:
    """Run a program and its tests in the sandbox.

    Args:
        program: program and tests; a string is a program without separate tests, which passes when no exception leaves
            it and it does not exit early.
        limits: resources it may use.
        weak: see `containment`.
        seed: hash seed of the interpreter, and seed of the `random` module.

    Raises:
        EvaluationError: no process can be started, or the machine does not give the layers that it gave before.
    """
    chosen = containment(weak)
    task = Program(program) if isinstance(program, str) else program
    report, code = _execute(task, limits, chosen.mode, seed)
    if report is not None and report.status == "unavailable":  # a shortage of processes or memory may have passed
        report, code = _execute(task, limits, chosen.mode, seed)
    if report is None:
        if abs(code) in (signal.SIGKILL, signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXCPU):
            return Verdict(
                "timed out", f"used more than {limits.cpu_seconds} s of CPU time, or was killed", chosen.layers
            )
        return Verdict("failed", f"the test process left no report (exit code {code})", chosen.layers)
    if report.status == "unavailable" or report.layers != chosen.layers:
        detail = report.detail or f"layers {', '.join(report.layers)} instead of {chosen}"
        raise EvaluationError(f"The sandbox could not be set up as before: {detail}.")
    return Verdict(report.status, report.detail, report.layers)  # type: ignore[arg-type]


def run_programs(
    programs: Sequence[Program | str],
    limits: Limits = DEFAULT_LIMITS,
    workers: int | None = None,
    weak: bool = False,
    seed: int = 0,
) -> list[Verdict]:
    """Run many programs, `workers` at a time (default: the cores this process may use), and return their verdicts."""
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        return list(pool.map(lambda program: run_program(program, limits, weak, seed), programs))
