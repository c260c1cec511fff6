"""Starting several processes of one run, as a launcher does: each told its number by the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
"""How accelerate starts several processes, on CPUs too: `--cpu` starts one, whatever number is asked for."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


def start(count: int, *command: object, **more: str) -> list[subprocess.Popen[str]]:
    """Start a script in `count` processes that are to find each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in common.items()},
                 "RANK": str(rank), "LOCAL_RANK": str(rank), **more},
        )
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[Ended]:
    """Wait for all of them; none outlives the test."""
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Ended(process.returncode, *said) for process, said in zip(processes, found, strict=True)]


def together(count: int, *command: object) -> list[Ended]:
    """Run a script in `count` processes to its end."""
    return ended(start(count, *command))


def by_accelerate(count: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a script by `accelerate launch`."""
    words = [sys.executable, "-m", *ACCELERATE, "--num_processes", str(count), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False)
