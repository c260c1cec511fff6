"""Reading and writing small files, and taking paths as users write them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from common.errors import CheckpointError
from common.files import bounded_reading
from common.files.atomic import write_file as write_whole
from common.files.bounded_reading import MAX_CONFIG, MAX_TOKENIZER, MAX_TOKENIZER_VALUES, MAX_VALUES, UnreadableError
from common.files.json_values import JsonObject

__all__ = ["file_digest", "known_digest", "read_json", "user_path", "write_whole"]


def user_path(text: str) -> Path:
    """Return the path that a flag or YAML key gives, with ~ expanded."""
    return Path(text).expanduser()


def read_json(file: Path, missing: str) -> JsonObject:
    """Read a JSON object from a foreign file, within the limits of `common.files.bounded_reading`.

    Raises CheckpointError with the sentence `missing` where there is no such file, or naming one that is not read.
    """
    large = file.name.startswith("tokenizer") or file.name in ("vocab.json", "tekken.json")
    limits = (MAX_TOKENIZER, MAX_TOKENIZER_VALUES) if large else (MAX_CONFIG, MAX_VALUES)
    try:
        data = bounded_reading.read_json(file, *limits)
    except FileNotFoundError:
        raise CheckpointError(missing or f"{file} does not exist.") from None
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} should hold a JSON object.")
    return data


def known_digest(file: Path) -> str | None:
    """Return the SHA-256 that the hub's cache names a large file by, or None for another file."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a regular file. Raises UnreadableError for a FIFO, device, socket or folder."""
    with bounded_reading.open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
