"""The user's cache folder, trusted only where it is this user's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

NAME = "activation-informed-merging"


def cache_folder() -> Path | None:
    """Return the folder for what is computed once, made where it is absent; None where there is no safe place.

    It is $XDG_CACHE_HOME or ~/.cache, and in it a folder that this user owns and nobody else may write to.
    """
    above = os.environ.get("XDG_CACHE_HOME") or _home_cache()
    if above is None or not os.path.isabs(above):
        return None
    folder = Path(above) / NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or not _is_mine(status):
            return None
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def is_private_file(file: Path) -> bool:
    """Return whether a path is a regular file (no link) of this user's that nobody else may write to."""
    try:
        status = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_mine(status)


def _is_mine(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _home_cache() -> str | None:
    """~/.cache, None for a user without a home: HOME is unset and there is no entry in the password database."""
    home = os.path.expanduser("~")
    return os.path.join(home, ".cache") if os.path.isabs(home) else None
