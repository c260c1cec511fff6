"""Checks of the output path: refused where nothing can be written, or where something would be lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from common.errors import UsageError

RECORD = "run_record.json"
"""The file that marks a checkpoint written here and tells how it was made."""


def check_target(save_path: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a target that holds something or cannot be made.

    With `overwrite` a folder is replaced only where it holds a checkpoint that was written here (its run record), and
    never where it is or contains the current folder.

    Args:
        save_path: the folder of the result.
        overwrite: replace an earlier result.
        resume: an interrupted run is to be continued.

    Raises:
        UsageError: naming the folder and what is in the way.
    """
    target = save_path.resolve()
    if target.is_mount():
        raise UsageError(f"--save_path {save_path} is a mount point, which cannot be replaced; give a folder in it.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save_path {save_path} is a file; give a folder.")
    _check_parent(save_path, target)
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


def check_untouched(save_path: Path, inputs: Iterable[Path]) -> None:
    """Refuse a target that is, contains or lies in an input. Raises UsageError."""
    target = save_path.resolve()
    for path in inputs:
        place = path.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise UsageError(f"--save_path {save_path} would write over or into the input {path}; give another folder.")


def _check_parent(save_path: Path, target: Path) -> None:
    """Refuse a place where no folder can be made, by making one in the nearest folder above that exists.

    Permissions alone do not tell: of root, of a read-only disk, of a network's rules.
    """
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise UsageError(f"--save_path {save_path}: {parent} is a file, so that no folder can be made in it.")
    probe = parent / f".{target.name}.probe"  # by this name a later run removes what a killed one left
    try:
        with suppress(FileExistsError):
            probe.mkdir()
        with suppress(FileNotFoundError):
            probe.rmdir()
    except OSError as error:
        raise UsageError(
            f"--save_path {save_path}: no folder can be made in {parent} ({error.strerror}); give another place."
        ) from None
