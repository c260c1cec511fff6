"""Compiling the kernels on this machine, once for each kind of processor: kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from console.cli import say

FOLDER = Path(__file__).resolve().parent
SOURCES = ("kernels.c",)
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No fused multiply-add and no fast math: what is computed is what is written."""
SWITCH = "MERGE_KERNELS"
"""Environment variable; `off` leaves the kernels out."""


def cache_folder() -> Path:
    """Return where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "activation-informed-merging"


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, built where need be; None where there is no compiler, or they are switched off."""
    if os.environ.get(SWITCH) == "off" or (compiler := _compiler()) is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        say(f"The kernels cannot be compiled and are left out, which is slower ({' '.join(str(error).split())[:200]}).")
        return None


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def _built(compiler: str) -> Path:
    """Compile into the cache, unless it is there. Raises OSError or SubprocessError."""
    sources = [FOLDER / name for name in SOURCES]
    parts = [*(source.read_bytes() for source in sources), " ".join(FLAGS).encode(), _processor().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    built = cache_folder() / f"kernels-{key}.so"
    if not built.is_file():
        try:
            built.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            built = Path(tempfile.mkdtemp(prefix="kernels-")) / built.name
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            fresh = Path(scratch) / built.name
            command = [compiler, *FLAGS, *map(str, sources), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            fresh.replace(built)
    return built


def _processor() -> str:
    """What the machine's instructions are: a cache on a shared disk serves several kinds of machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {flags}"
