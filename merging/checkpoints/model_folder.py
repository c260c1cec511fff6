"""Files of a model folder: checks that they are regular and inside it, and the tokenizer's files."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TEXT, MAX_TOKENIZER
from common.files.paths import read_json
from common.files.temporary import new_folder
from common.terminal_text import foreign

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "vocab-*.json", "*_vocab.json", "*.tiktoken", "tekken.json",
                "*.spm", "dict.txt", "*.tokenizer")  # fmt: skip
"""Files that hold a vocabulary; every tokenizer but a byte-level one has at least one of them."""
SETTINGS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes", "normalizer.json",
            "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json")  # fmt: skip
"""Settings that accompany a vocabulary."""
TEMPLATES_AND_PROCESSORS = ("*.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
                            "video_preprocessor_config.json")  # fmt: skip
"""Chat templates, and configs of processors for images and audio."""
CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
PARSED = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.json", "adapter_config.json",
)  # fmt: skip
"""Files that transformers or PEFT parse themselves; they are parsed within limits before."""
SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".model", ".txt", ".md")
"""Suffixes of files that are read; a folder of such a name would look like an absent file."""
READ_FOLDERS = ("additional_chat_templates",)
"""Subfolders that transformers' tokenizer loader reads."""


def check_folder(folder: Path) -> None:
    """Refuse a model folder with FIFOs, devices or sockets, links that lead out of it, or JSON beyond the limits.

    Links from the hub's cache into the blobs of the same repository are allowed.

    Raises:
        CheckpointError: Naming the file.
    """
    if not folder.exists():  # a model of the hub that is not downloaded yet
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
    """Refuse a file of a model folder that is no regular file, or a link that leads out of the folder.

    Raises:
        CheckpointError: Naming the file.
    """
    _check_entry(folder, file, True)


def _check_entry(folder: Path, file: Path, is_link: bool) -> None:
    try:
        mode = file.stat().st_mode
    except OSError:
        return  # a dangling link: the reader of the file reports it
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


def tokenizer_files(folder: Path) -> list[Path]:
    """Return a model folder's files of tokenizer, chat templates and processors, sorted by name."""
    return _matching(folder, (*VOCABULARIES, *SETTINGS, *TEMPLATES_AND_PROCESSORS))


def vocabulary_files(folder: Path, settings: bool = True) -> list[Path]:
    """Return the files in a model folder that decide the id of each token, sorted by name.

    Args:
        folder: The model folder.
        settings: Include the settings that accompany a vocabulary.
    """
    return _matching(folder, (*VOCABULARIES, *(SETTINGS if settings else ())))


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    matches = (folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    return sorted(file for file in matches if file.is_file())


def with_tokenizer_of(folder: Path, adapter_folder: Path) -> Path:
    """Return a temporary folder with a base's configs and an adapter's tokenizer; `folder` where the adapter has none.

    Adapters bring a tokenizer where they were trained with further tokens or another chat template.
    """
    if not vocabulary_files(adapter_folder, settings=False):
        return folder
    configs = [folder / name for name in CONFIGS if (folder / name).is_file()]
    combined = new_folder("inputs")
    for name, file in {file.name: file for file in (*configs, *tokenizer_files(adapter_folder))}.items():
        (combined / name).symlink_to(file.resolve())
    return combined
