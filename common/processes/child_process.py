"""Interpreters that this project starts: without the current folder on their path, a fixed environment, and bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PASSED = (
    "PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SSL_CERT_FILE",
)  # fmt: skip
"""Environment variables that a child gets, besides those that begin as PREFIXES do."""
PREFIXES = ("LC_", "HF_", "XDG_")


def child_environment() -> dict[str, str]:
    """Return the environment of a child interpreter: what libraries need to be found, nothing that runs other code.

    Of PYTHONPATH only absolute folders stay: a relative one, or an empty entry, is the current folder.
    """
    passed = {key: value for key, value in os.environ.items() if key in PASSED or key.startswith(PREFIXES)}
    folders = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    if folders:
        passed["PYTHONPATH"] = os.pathsep.join(folders)
    return passed | {
        "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def run_python(code: str, arguments: Sequence[str], seconds: float, memory: int) -> bytes:
    """Run code in an interpreter of its own and return its standard output; standard input is empty.

    Args:
        code: source of the program; the folder of this project is added to its path.
        arguments: its sys.argv[1:].
        seconds: wall-clock limit.
        memory: limit of its data segments in bytes.

    Raises:
        OSError, subprocess.SubprocessError: it could not be started, failed, or exceeded a limit.
    """
    root = Path(__file__).resolve().parents[2]
    prelude = (
        "import resource, sys\n"
        f"if sys.platform == 'linux': resource.setrlimit(resource.RLIMIT_DATA, ({memory}, {memory}))\n"
        f"sys.path.insert(0, {str(root)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", prelude + code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=seconds,
        env=child_environment(),
    )
    return done.stdout
