"""Size, time and inode of a file, to notice that it was changed while it was being used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import CheckpointError


@dataclass(frozen=True)
class FileState:
    """Size, modification time, inode and device of a file, which tell its versions apart."""

    size: int
    modified: int
    inode: int
    device: int


def state_of(file: Path) -> FileState | None:
    """Return a file's state; None where it does not exist."""
    try:
        info = os.stat(file)
    except FileNotFoundError:
        return None
    return FileState(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev)


def states_of(files: Iterable[Path]) -> dict[Path, FileState]:
    """Return the states of the files that exist."""
    return {file: state for file in files if (state := state_of(file)) is not None}


def check_unchanged(before: Mapping[Path, FileState]) -> None:
    """Compare files with their earlier states.

    Raises:
        CheckpointError: Naming the first file that was changed, with what differs.
    """
    for file, state in before.items():
        now = state_of(file)
        if now == state:
            continue
        if now is None:
            how = "it is gone"
        elif now.size != state.size:
            how = f"it had {state.size} bytes and has {now.size}"
        elif now.modified != state.modified:
            how = "it was written again"
        else:
            how = "another file took its name"
        raise CheckpointError(f"{file} was changed during the run ({how}); run again when it is complete.")
