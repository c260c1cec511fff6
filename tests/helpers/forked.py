"""Processes forked from a server that has imported torch, transformers and this project, so that a start is fast.

What runs in them is the program itself: its arguments, folder, environment, pipes, signals and exit codes are those of
a process that Python starts.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as init_distributed sets it, before the server imports torch
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "torch", "torch.distributed", "safetensors.torch", "tokenizers", "transformers",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
PACKAGES = ("common", "merging", "aim", "eval/report", "eval/results", "eval/stats")
READ_AT_IMPORT = (
    "HF_", "HOME", "XDG_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "KMP_", "GOMP_", "CUDA", "PYTHON", "LD_", "TMPDIR",
    "TOKENIZERS_", "LANG", "LC_", "MERGE_",
)  # fmt: skip
"""Beginnings of the environment variables that Python and libraries read when they start."""

_at_start: dict[str, str] = {}


def server() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first call starts it."""
    context = multiprocessing.get_context("forkserver")
    if not _at_start:
        _at_start.update(_read_at_import(os.environ))
        files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
        names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
        context.set_forkserver_preload([*LIBRARIES, *names])
        forkserver.ensure_running()
    return context


def can_fork(script: str, environment: Mapping[str, str]) -> bool:
    """Return whether a forked process is like a started one: a script file, whose libraries read the same variables."""
    return script.endswith(".py") and _read_at_import(environment) == _at_start


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(READ_AT_IMPORT)}


def run_script(*arguments: object, cwd: Path = ROOT, answers: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or code after -c, as a user does; returns the finished process with its text.

    A script is forked, unless its libraries would read other environment variables than those of the server. answers:
    its standard input.
    """
    words, environment = [str(argument) for argument in arguments], {**os.environ, **env}
    server()
    if can_fork(words[0], environment):
        return run_forked(words, cwd, environment, answers)
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=cwd, input=answers, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def run_forked(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], answers: str = "", seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script file with its arguments in a forked process, as `subprocess.run` of Python does."""
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        Path(folder, "in").write_text(answers)
        process = server().Process(target=_be_script, args=(list(command), str(cwd), dict(environment), folder))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(list(command), seconds)
        out, err = (Path(folder, name).read_text() if Path(folder, name).exists() else "" for name in ("out", "err"))
        code = process.exitcode
        process.close()
    assert code is not None
    return subprocess.CompletedProcess(list(command), code, out, err)


def redirect(folder: Path, prefix: str = "") -> None:
    """Write this process's standard output and error to the files out and err of a folder."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{prefix}{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _be_script(command: Sequence[str], cwd: str, environment: Mapping[str, str], folder: str) -> None:
    redirect(Path(folder))
    os.dup2(os.open(Path(folder, "in"), os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (multiprocessing has put an empty one)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without them
