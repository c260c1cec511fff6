"""Names of models: folders, hub ids with a revision, and BASE+ADAPTER; their files and one label for every spelling."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import BadInputError, UsageError, first_line
from eval.harness.identity import WEIGHTS

HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class ModelReference:
    """A model by its base and, for BASE+ADAPTER, its adapter; each a folder or a hub id with an optional revision."""

    base: str
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read `model` or `base+adapter`; a folder that exists is one name, whatever signs it holds.

        Raises:
            UsageError: One side of the plus sign is empty.
        """
        if "+" not in text or Path(text).exists():
            return cls(text)
        splits = [(text[:at], text[at + 1 :]) for at, sign in enumerate(text) if sign == "+"]
        base, adapter = next((s for s in splits if Path(s[0]).exists() and Path(s[1]).exists()), None) or next(
            (s for s in splits if Path(s[0]).exists() or Path(s[1]).exists()), splits[0]
        )
        if not base or not adapter:
            raise UsageError(f"--model {text}: give an adapter as BASE+ADAPTER.")
        return cls(base, adapter)

    @property
    def label(self) -> str:
        """One name for all spellings of the model.

        A folder is relative to the working directory where it lies below, else absolute; a hub id is without `@main`.
        """
        base = _label(self.base)
        return f"{base}+{_label(self.adapter)}" if self.adapter else base


def label_of(model: str) -> str:
    """Return the label of a model as a user wrote it."""
    return ModelReference.parse(model).label


def _label(name: str) -> str:
    return path_label(name) if Path(name).exists() else name.removesuffix("@main")


def path_label(path: str) -> str:
    """Return a path relative to the working directory where it lies below, else absolute; it need not exist."""
    absolute = os.path.abspath(path)
    relative = os.path.relpath(absolute)
    return absolute if relative.startswith(".") else relative


def small_files(name: str, revision: str | None = None) -> Path:
    """Return the folder with configuration and tokenizer, fetched from the hub or its cache for a hub id."""
    return Path(name) if Path(name).is_dir() else _snapshot(name, HUB_FILES, revision)


def with_weights(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model with its weights: safetensors, or `.bin` files where it has no others.

    Raises:
        BadInputError: The hub has no weights of it.
    """
    if Path(name).is_dir():
        return Path(name)
    for pattern in WEIGHTS:
        folder = _snapshot(name, (*HUB_FILES, pattern), revision)
        if any(folder.glob(pattern)):
            return folder
    raise BadInputError(f"--model {name} has no weights on the hub ({' or '.join(WEIGHTS)}).")


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter.

    Raises:
        BadInputError: It is not an adapter, or has no weights.
    """
    folder = Path(name) if Path(name).is_dir() else _snapshot(name, (ADAPTER_CONFIG, *ADAPTER_WEIGHTS), None)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise BadInputError(f"{name} is not an adapter: it has no {ADAPTER_CONFIG}.")
    if not any((folder / file).is_file() for file in ADAPTER_WEIGHTS):
        raise BadInputError(f"The adapter {name} has no weights ({' or '.join(ADAPTER_WEIGHTS)}).")
    return folder


def split_revision(name: str, revision: str | None = None) -> tuple[str, str]:
    """Split `organization/name@revision`; `revision` is that of --model_args.

    Raises:
        UsageError: Both name a revision, and not the same one.
    """
    if Path(name).is_dir():
        return name, "main"
    repo, _, named_revision = name.partition("@")
    if named_revision and revision and named_revision != revision:
        raise UsageError(f"--model {name} and --model_args revision={revision} contradict each other; give one.")
    return repo, named_revision or revision or "main"


def _snapshot(name: str, patterns: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    repo, wanted = split_revision(name, revision)
    try:
        return Path(snapshot_download(repo, revision=wanted, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client has a dozen exceptions, and its transport has others
        raise BadInputError(
            f"--model {name} is neither a folder nor available from the hub or its cache: {first_line(error)}"
        ) from error
