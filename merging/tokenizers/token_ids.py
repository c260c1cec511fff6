"""Which id each token of a model folder has. Equal tokenizers are loaded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TOKENIZER, UnreadableError, parse_json, read_bytes
from merging.checkpoints.tokenizer_files import vocabulary_files
from merging.tokenizers.loading import Tokenizer, load_tokenizers

DECIDING = ("model_type", "model_name", "tokenizer_class", "auto_map")
"""Keys of config.json by which transformers chooses the tokenizer's class."""
IDLE = ("chat_template", "name_or_path", "transformers_version", "model_max_length", "padding_side", "truncation_side")
"""Settings of a tokenizer that have no part in its vocabulary."""
_known: dict[str, Tokenizer | None] = {}


def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Return {token string: id} of the tokenizer in a model folder; None where it has none, or one of its own code.

    Raises CheckpointError for a tokenizer that transformers cannot load.
    """
    found = read_tokenizer(folder)
    return None if found is None else found.tokens


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a model folder, None where there is none. Raises CheckpointError as `token_ids` does."""
    read_tokenizers([folder])
    digest = tokenizer_digest(folder)
    return None if digest is None else _known[digest]


def read_tokenizers(folders: Iterable[Path], apart: bool = True) -> None:
    """Load the tokenizers of several folders together, which is faster.

    apart: in a process of their own, where transformers is not imported yet. Raises CheckpointError as `token_ids`.
    """
    digests = {tokenizer_digest(folder): folder for folder in folders}
    wanted = {digest: folder for digest, folder in digests.items() if digest is not None and digest not in _known}
    if wanted:
        _known.update(zip(wanted, load_tokenizers(list(wanted.values()), apart), strict=True))


def tokenizer_digest(folder: Path) -> str | None:
    """Return a digest of all that decides which token has which id; None where there is nothing of a tokenizer."""
    files = vocabulary_files(folder)
    if not files:
        return None
    config = folder / "config.json"
    seen = [*files, *([config] if config.is_file() else [])]
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in seen))


@lru_cache(maxsize=256)
def _digest(seen: tuple[tuple[Path, int, int], ...]) -> str:
    """The digest of files with their sizes and times."""
    whole = hashlib.sha256()
    for file, _, _ in seen:
        try:
            data = read_bytes(file, MAX_TOKENIZER)
        except UnreadableError as error:
            raise CheckpointError(str(error)) from error
        with suppress(UnreadableError, AttributeError):  # what is no JSON object is taken as it is
            if file.name == "config.json":
                settings = parse_json(data, str(file)).items()
                data = _canonical({key: value for key, value in settings if key in DECIDING})
            elif file.name == "tokenizer_config.json":
                settings = parse_json(data, str(file)).items()
                data = _canonical({key: value for key, value in settings if key not in IDLE})
        whole.update(f"{file.name} {len(data)}\n".encode() + data)
    return whole.hexdigest()


def _canonical(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings).encode()
