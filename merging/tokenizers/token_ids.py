"""Token ids of model folders, cached by digest: equal tokenizers are loaded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TOKENIZER, UnreadableError, parse_json, read_bytes
from common.files.json_values import JsonValue
from merging.checkpoints.model_folder import vocabulary_files
from merging.tokenizers.loading import Tokenizer, load_tokenizers

CLASS_KEYS = ("model_type", "model_name", "tokenizer_class", "auto_map")
"""Keys of config.json from which transformers chooses the tokenizer's class."""
WITHOUT_EFFECT = (
    "chat_template",
    "name_or_path",
    "transformers_version",
    "model_max_length",
    "padding_side",
    "truncation_side",
)
"""Settings of a tokenizer that do not affect its vocabulary."""
_cache: dict[str, Tokenizer | None] = {}


def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Return {token string: id} of a model folder; None where it has no tokenizer, or one defined by custom code.

    Raises:
        CheckpointError: transformers cannot load the tokenizer.
    """
    tokenizer = read_tokenizer(folder)
    return None if tokenizer is None else tokenizer.tokens


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a model folder, None where there is none. Raises CheckpointError as `token_ids` does."""
    read_tokenizers([folder])
    digest = tokenizer_digest(folder)
    return None if digest is None else _cache[digest]


def read_tokenizers(folders: Iterable[Path], in_subprocess: bool = True) -> None:
    """Load the tokenizers of several folders into the cache together, which is faster than one by one.

    Args:
        folders: Model folders.
        in_subprocess: Load them in a process without torch where transformers is not imported yet.

    Raises:
        CheckpointError: transformers cannot load a tokenizer.
    """
    digests = {tokenizer_digest(folder): folder for folder in folders}
    missing = {digest: folder for digest, folder in digests.items() if digest is not None and digest not in _cache}
    if missing:
        _cache.update(zip(missing, load_tokenizers(list(missing.values()), in_subprocess), strict=True))


def tokenizer_digest(folder: Path) -> str | None:
    """Return a digest of the files that decide the token ids; None where a folder has no tokenizer files."""
    files = vocabulary_files(folder)
    if not files:
        return None
    config = folder / "config.json"
    inputs = [*files, *([config] if config.is_file() else [])]
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in inputs))


@lru_cache(maxsize=256)
def _digest(inputs: tuple[tuple[Path, int, int], ...]) -> str:
    """Return the digest of files; sizes and times are part of the key of the cache."""
    whole = hashlib.sha256()
    for file, _, _ in inputs:
        try:
            data = read_bytes(file, MAX_TOKENIZER)
        except UnreadableError as error:
            raise CheckpointError(str(error)) from error
        with suppress(UnreadableError, AttributeError):  # a file that is no JSON object is digested as it is
            if file.name == "config.json":
                settings = parse_json(data, str(file)).items()
                data = _canonical({key: value for key, value in settings if key in CLASS_KEYS})
            elif file.name == "tokenizer_config.json":
                settings = parse_json(data, str(file)).items()
                data = _canonical({key: value for key, value in settings if key not in WITHOUT_EFFECT})
        whole.update(f"{file.name} {len(data)}\n".encode() + data)
    return whole.hexdigest()


def _canonical(settings: Mapping[str, JsonValue]) -> bytes:
    return json.dumps(settings).encode()
