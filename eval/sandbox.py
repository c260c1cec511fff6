"""Runs model-written code in a process of its own: no network, no processes, bounded time, memory and files.

A fresh interpreter (`python -I`, empty environment, no input, a temporary working directory removed afterwards) runs
sandbox_child.py, which sets resource limits, leaves the network and makes the file system read-only by Linux
namespaces where the system allows, and refuses the rest by an audit hook of the interpreter. That contains the code
that models write; it is not a wall against code written to break out. Importing this module runs nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from console.errors import EvaluationError
from console.processor import usable_cores

CHILD = Path(__file__).with_name("sandbox_child.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": os.defpath}


@dataclass(frozen=True)
class Limits:
    """What a program may use. The public harness gives 3 s of wall-clock time; we count CPU time, so that the verdict
    depends less on how busy the machine is, with a wall-clock limit for programs that sleep. 10 s because the slowest
    solution that a benchmark ships with (MBPP 123) takes 3 s on an idle core, and 5 s beside other work."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 2 << 30
    file_bytes: int = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """How a program ended; `layers` are the namespaces that held ("network", "files"), besides limits and hook."""

    status: Literal["passed", "failed", "timed out"]
    detail: str = ""
    layers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(program: str, limits: Limits = Limits()) -> Verdict:
    """Run `program` to its end in the sandbox. It passes when no exception leaves it and it does not exit early.

    Raises EvaluationError only where no process can be started.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="aim-sandbox-", ignore_cleanup_errors=True) as folder:
        directory = os.path.realpath(folder)
        request = {"program": program, "directory": directory, "token": token, "cpu_seconds": limits.cpu_seconds}
        request |= {"memory": limits.memory, "file_bytes": limits.file_bytes}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            raise EvaluationError(f"The sandbox could not start {sys.executable}: {error}.") from error
        try:
            output, _ = process.communicate(json.dumps(request).encode("utf-8", "surrogatepass"), limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Verdict("timed out", f"still running after {limits.wall_seconds:g} s")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    return _verdict(output, process.returncode, token, limits)


def _verdict(output: bytes, code: int, token: str, limits: Limits) -> Verdict:
    try:
        answer = json.loads(output)
        if answer["token"] != token:
            raise ValueError("another program's token")
    except (ValueError, KeyError, TypeError):
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return Verdict("timed out", f"used more than {limits.cpu_seconds} s of CPU time, or was killed")
        return Verdict("failed", f"left before its end (exit code {code})")
    return Verdict("failed" if answer["error"] else "passed", answer["error"], tuple(answer["layers"]))


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
) -> list[Verdict]:
    """Run many programs, `workers` at a time (the cores this process may use), in the order given."""
    usable = usable_cores()
    with ThreadPoolExecutor(workers or usable) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def containment() -> str:
    """Say in a few words what holds here beyond limits and hook, by running an empty program."""
    layers = run_program("").layers
    network = "no network (namespace)" if "network" in layers else "network refused by the interpreter's hook only"
    files = "file system read-only" if "files" in layers else "writes refused by the interpreter's hook only"
    return f"time, memory and file limits; {network}; {files}"
