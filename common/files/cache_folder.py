"""The user's cache folder, trusted only where it is this user's alone."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from common.errors import FailureError
from common.files.atomic import write_file

NAME = "activation-informed-merging"
MOST_REMEMBERED = 1000
"""Results of one kind that are kept."""


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


def remember(file: Path, text: str) -> None:
    """Write a small result into the cache, of which the newest of its kind stay; a failure costs only time later.

    Args:
        file: In the cache folder; its kind is the name up to the first hyphen.
        text: The content.
    """
    kind = file.name.partition("-")[0]
    with suppress(OSError, FailureError):
        write_file(file, text.encode())
        file.chmod(0o600)
        dated = sorted(((other.stat().st_mtime_ns, other) for other in file.parent.glob(f"{kind}-*")), reverse=True)
        for _, old in dated[MOST_REMEMBERED:]:
            old.unlink(missing_ok=True)


def _is_mine(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _home_cache() -> str | None:
    """~/.cache, None for a user without a home: HOME is unset and there is no entry in the password database."""
    home = os.path.expanduser("~")
    return os.path.join(home, ".cache") if os.path.isabs(home) else None
