"""Folders for this run alone, gone at its end."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from merging.tokenizer_files import tokenizer_files, vocabulary_files

CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")

_made: set[Path] = set()


def scratch_folder() -> Path:
    """Return a new empty folder that is removed when the interpreter ends."""
    folder = Path(tempfile.mkdtemp(prefix="merging-"))
    _made.add(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_scratch(file: Path) -> bool:
    """Whether a file is in such a folder, so that another run finds the same content elsewhere."""
    return any(folder in file.parents for folder in _made)


def overlay(below: Path, above: Path) -> Path:
    """Return a folder with the small files of `below`, the tokenizer taken from `above`; `below` itself if it has none.

    For an adapter that was trained with more tokens, or with another chat template, than its base has.
    """
    if not vocabulary_files(above, settings=False):
        return below
    theirs = tokenizer_files(above)
    kept = [below / name for name in CONFIGS if (below / name).is_file()]
    folder = scratch_folder()
    for name, file in {file.name: file for file in (*kept, *theirs)}.items():
        (folder / name).symlink_to(file.resolve())
    return folder
