"""Several processes of one run, as a launcher starts them: each told its number by the environment.

They are forked; what they run is the scripts' own edge, with pipes, signals and exit codes of their own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forked import ROOT, redirect, server

ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
)
"""How accelerate starts several processes, on CPUs too: `--cpu` starts one, whatever number is asked for."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int | None
    out: str
    err: str


class Launch:
    """The processes of one run of a script; `log` has what they say."""

    def __init__(self, log: Path, count: int, script: str, *arguments: object) -> None:
        log.mkdir(parents=True)
        context = server()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.log = log
        self.processes = [
            context.Process(target=_run, args=(log, rank, count, port, script, [str(a) for a in arguments]))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def ended(self, seconds: float = 120) -> list[Ended]:
        """Wait for all of them; none outlives the test."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not late, f"processes {late} did not end within {seconds} s: {self.said('err')}"
        codes = [process.exitcode for process in self.processes]
        return [Ended(*found) for found in zip(codes, self.said("out"), self.said("err"), strict=True)]

    def said(self, where: str) -> list[str]:
        """What each process has said so far."""
        files = [self.log / f"{rank}.{where}" for rank in range(len(self.processes))]
        return [file.read_text() if file.exists() else "" for file in files]

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true while all of them run."""
        deadline = time.monotonic() + seconds
        while not true():
            assert all(process.is_alive() for process in self.processes), self.said("err")
            assert time.monotonic() < deadline
            time.sleep(0.002)


def _run(log: Path, rank: int, count: int, port: int, script: str, arguments: Sequence[str]) -> None:
    """Be one of the processes: a script's main, at the scripts' edge."""
    redirect(log, f"{rank}.")
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    import importlib

    import torch

    from common.cli import run

    torch.set_num_threads(1)
    code = run(importlib.import_module(script).main, arguments)
    sys.exit(code)


def together(log: Path, count: int, script: str, *arguments: object) -> list[Ended]:
    """Run a script in `count` processes to its end."""
    return Launch(log, count, script, *arguments).ended()


def by_accelerate(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a script by `accelerate launch`, from its first import."""
    words = [sys.executable, "-m", *ACCELERATE, "--num_processes", str(count), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False)
