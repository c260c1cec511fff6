"""Compilation of the kernels on this machine, once for each kind of processor, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from common.files.atomic import write_file
from common.files.bounded_reading import read_bytes
from common.files.cache_folder import cache_folder, is_private_file
from common.files.temporary import temporary_folder
from common.logging import logger
from common.terminal_text import foreign

FOLDER = Path(__file__).resolve().parent
SOURCES = ("kernels.c", "bus_errors.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No fused multiply-add and no fast math: the compiler keeps the arithmetic as written."""
MAX_LIBRARY = 64 << 20
SWITCH = "MERGE_KERNELS"
"""Environment variable; `off` leaves the kernels out."""


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, built if necessary; None where that fails or where they are switched off."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        text = foreign(detail.decode(errors="replace") if isinstance(detail, bytes) else detail, 200)
        logger.warning(f"The kernels cannot be compiled and are left out, which is slower ({text}).")
        return None


def _compiler() -> str:
    """Return the C compiler. Raises FileNotFoundError where there is none."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler: cc, gcc and clang are not on PATH")
    return compiler


def _load() -> ctypes.CDLL:
    """Load the kernels from the cache, or compile them. Raises OSError or SubprocessError.

    The name of a cached library ends with the digest of its bytes: a truncated or changed one is compiled anew.
    """
    key, folder = _key(), cache_folder()
    for cached in sorted(folder.glob(f"kernels-{key}-*.so")) if folder else ():
        if _is_whole(cached):
            return ctypes.CDLL(str(cached))
        cached.unlink(missing_ok=True)
    with temporary_folder("kernels") as scratch:
        fresh = scratch / "kernels.so"
        command = [_compiler(), *FLAGS, *(str(FOLDER / name) for name in SOURCES), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        fresh.chmod(0o700)
        if folder is None:
            return ctypes.CDLL(str(fresh))  # stays mapped when its file is gone
        cached = folder / f"kernels-{key}-{_digest(fresh)}.so"
        write_file(cached, fresh.read_bytes())
        cached.chmod(0o700)
    return ctypes.CDLL(str(cached))


def _key() -> str:
    """Digest of everything that the compiled code depends on."""
    sources = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts = [*sources, " ".join(FLAGS).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _is_whole(library_file: Path) -> bool:
    """Return True if a cached library belongs to this user and its bytes have the digest in its name."""
    if not is_private_file(library_file):
        return False
    try:
        return library_file.stem.rpartition("-")[2] == _digest(library_file)
    except (OSError, ValueError):
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(read_bytes(file, MAX_LIBRARY)).hexdigest()[:32]


def _processor() -> str:
    """Return the machine's instruction set: a cache on a shared disk serves several kinds of machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {flags}"
