"""Small files of one input combined with those of another, in a temporary folder of this run."""

from __future__ import annotations

from pathlib import Path

from common.files.temporary import is_temporary, new_folder
from merging.checkpoints.tokenizer_files import tokenizer_files, vocabulary_files

CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def scratch_folder() -> Path:
    """Return a new empty folder that is removed when the process ends."""
    return new_folder("inputs")


def is_scratch(file: Path) -> bool:
    """Return whether a file is in such a folder, so that another run finds the same content elsewhere."""
    return is_temporary(file)


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
