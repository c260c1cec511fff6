"""Safety of a model folder: its files are regular, and no link leads out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TEXT, MAX_TOKENIZER
from common.files.paths import read_json
from common.terminal_text import foreign
from merging.checkpoints.tokenizer_files import tokenizer_files

PARSED = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "adapter_config.json",
)  # fmt: skip
"""Files that transformers or PEFT parse as they are, and that are therefore parsed within limits first."""
SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".md")
"""Endings of files that are read; a folder of such a name would pass for an absent file."""
READ_FOLDERS = ("additional_chat_templates",)
"""Folders inside a model folder that a tokenizer's loader reads."""


def check_folder(folder: Path) -> None:
    """Refuse a model folder that holds FIFOs, devices or sockets, links to files outside of it, or files without end.

    JSON that other libraries parse is parsed within limits first. Links into the blobs of the same repository in the
    hub's cache are the cache's own. Raises CheckpointError.
    """
    if not folder.exists():  # of the hub, and yet to be downloaded
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}).") from error
    for entry in entries:
        _check_entry(folder, Path(entry.path), entry.is_symlink())
    for file in tokenizer_files(folder):
        limit = MAX_TEXT if file.suffix == ".jinja" else MAX_TOKENIZER
        if (size := file.stat().st_size) > limit:
            raise CheckpointError(f"{file} has {size} bytes, and at most {limit} are read of such a file.")
    for name in PARSED:
        if (folder / name).is_file():
            read_json(folder / name, "")


def check_inside(folder: Path, file: Path) -> None:
    """Refuse a file of a model folder, perhaps in a folder inside it, that is no regular file or lies outside of it.

    Raises CheckpointError.
    """
    _check_entry(folder, file, True)


def _check_entry(folder: Path, file: Path, is_link: bool) -> None:
    try:
        mode = file.stat().st_mode
    except OSError:
        return  # a link to nothing: whoever needs the file misses it
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(f"{folder / foreign(file.name)} is a FIFO, device or socket; remove it from the model.")
    if stat.S_ISDIR(mode) and file.suffix in SUFFIXES:
        raise CheckpointError(f"{folder / foreign(file.name)} is a folder, and a regular file was expected.")
    if not is_link or (stat.S_ISDIR(mode) and file.name not in READ_FOLDERS):
        return
    target, home = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in target.parents and (blobs is None or target.parent != blobs):
        raise CheckpointError(
            f"{folder / foreign(file.name)} is a link that leads out of the model folder (to {foreign(str(target))}); "
            "put a copy of the file in its place, or name the folder that it is in."
        )
