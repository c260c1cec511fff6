"""Where a checkpoint lies: a local folder, the hub's cache, or the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from console.errors import CheckpointError, UsageError
from console.files import read_json

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class CheckpointRef:
    """A local folder, or a hub id `org/name` with an optional `@revision`."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """Read `folder`, `org/name` or `org/name@revision`. Raises UsageError for an empty name."""
        text = text.strip()
        if not text:
            raise UsageError("A model name is empty; give a folder or a hub id such as org/name.")
        if Path(text).expanduser().is_dir() or "@" not in text:
            return cls(text)
        path, _, revision = text.rpartition("@")
        return cls(path, revision)

    @property
    def is_hub_id(self) -> bool:
        """True for a name that is no local folder but has the form of a hub id."""
        return not Path(self.path).expanduser().is_dir() and bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.path))

    @property
    def full_name(self) -> str:
        """The hub id as given, or a local folder's absolute path, so that no relative path passes for a hub id."""
        return str(self) if self.is_hub_id else str(Path(self.path).expanduser().resolve())

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def locate(ref: CheckpointRef, weights: bool) -> Path:
    """Return the folder of a checkpoint, downloading the small files or (weights=True) all it needs from the hub.

    The hub's own cache, token and environment are used; the cache is tried first. Raises UsageError where there is no
    such folder, CheckpointError where the hub cannot give the model.
    """
    local = Path(ref.path).expanduser()
    if local.is_dir():
        return local
    if not ref.is_hub_id:
        raise UsageError(f"Model {ref} is no folder here, and not a hub id of the form org/name.")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    patterns = SMALL_FILES + (["*.safetensors", "pytorch_model*.bin"] if weights else [])
    try:
        cached = Path(snapshot_download(ref.path, revision=ref.revision, local_files_only=True))
        if not weights or _complete(cached) or constants.HF_HUB_OFFLINE:
            return cached
    except (hub.LocalEntryNotFoundError, OSError):
        pass
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"Model {ref} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set; "
            f"run `hf download {ref.path}` where there is internet."
        )
    try:
        if weights and any(f.endswith(".safetensors") for f in _hub_files(ref)):
            patterns.remove("pytorch_model*.bin")
        return Path(snapshot_download(ref.path, revision=ref.revision, allow_patterns=patterns))
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"Model {ref} is gated: accept its licence on its hub page, then run `hf auth login`."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise UsageError(f"Model {ref.path} has no revision {ref.revision!r} on the hub.") from error
    except hub.RepositoryNotFoundError as error:
        raise UsageError(
            f"Model {ref} is no folder here and not on the hub (or private: then run `hf auth login`)."
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"Model {ref} is no folder here, not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); run `hf download {ref.path}` where there is internet, or give a local folder."
        ) from error


def _hub_files(ref: CheckpointRef) -> list[str]:
    from huggingface_hub import list_repo_files

    return list_repo_files(ref.path, revision=ref.revision)


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot has its weights: a whole file, or every shard that its index names."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            shards = shards_of(folder / name) if name.endswith(".json") else []
            return all((folder / shard).exists() for shard in shards)
    return any(folder.glob("*.safetensors"))


def shards_of(index: Path) -> list[str]:
    """Return the files that an index names. Raises CheckpointError for an index that is broken."""
    return sorted(set(weight_map(index).values()))


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index. Raises CheckpointError for an index that is broken."""
    found = read_json(index, f"{index} does not exist.").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    return found
