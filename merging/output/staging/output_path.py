"""Where a result may be written: refused before anything is read, where it cannot be or something would be lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from common.errors import UsageError

RECORD = "run_record.json"
"""The file that marks a checkpoint written here and tells how it was made."""


def check_target(save_path: Path, overwrite: bool, inputs: Iterable[Path] = (), resume: bool = False) -> None:
    """Refuse a target that holds something, cannot be made, or touches an input. Raises UsageError.

    With `overwrite` a folder is replaced only where it holds a checkpoint that was written here (its run record), and
    never where it is, contains or lies in one of the `inputs` or the current folder.
    """
    target = save_path.resolve()
    if target.is_mount():
        raise UsageError(f"--save_path {save_path} is a mount point, which cannot be replaced; give a folder in it.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save_path {save_path} is a file; give a folder.")
    _check_parent(save_path, target)
    for path in inputs:
        taken = path.resolve()
        if target == taken or target in taken.parents or taken in target.parents:
            raise UsageError(f"--save_path {save_path} would write over or into the input {path}; give another folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite and resume and (target / RECORD).is_file():
        raise UsageError(
            f"--save_path {save_path} is a finished result: there is nothing to resume. To make it again add "
            "--overwrite, or give another folder."
        )
    if not overwrite:
        raise UsageError(f"--save_path {save_path} is not empty; give another folder or add --overwrite.")
    if not (target / RECORD).is_file() or target in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"--save_path {save_path} holds something that is no checkpoint written here (it has no {RECORD}); "
            "--overwrite does not replace it: give another folder."
        )
    if not os.access(target, os.W_OK | os.X_OK):
        raise UsageError(f"--save_path {save_path} cannot be replaced: it is write-protected; give another folder.")


def _check_parent(save_path: Path, target: Path) -> None:
    """Refuse a place where no folder can be made, by making one in the nearest folder above that exists.

    Permissions alone do not tell: of root, of a read-only disk, of a network's rules.
    """
    there = next(folder for folder in target.parents if folder.exists())
    if not there.is_dir():
        raise UsageError(f"--save_path {save_path}: {there} is a file, so that no folder can be made in it.")
    probe = there / f".{target.name}.probe"  # by this name a later run removes what a killed one left
    try:
        with suppress(FileExistsError):
            probe.mkdir()
        with suppress(FileNotFoundError):
            probe.rmdir()
    except OSError as error:
        raise UsageError(
            f"--save_path {save_path}: no folder can be made in {there} ({error.strerror}); give another place."
        ) from None
