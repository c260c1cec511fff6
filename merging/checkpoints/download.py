"""Location of models and their download from the hub: small files first, then missing weights."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import DISK_FULL, CheckpointError, HeadersUnknownError, ProjectError, UsageError, causes
from merging.checkpoints.headers import Layout, header_of, join_headers, read_headers
from merging.checkpoints.hub import CheckpointRef, Part
from merging.checkpoints.storage import DTYPES, TensorInfo

SMALL_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.spm",
    "bpe.codes",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
NESTED = ["*/*"]
"""Files in subfolders hold other formats (onnx/, original/) and are not fetched."""
COMPANIONS = ["additional_chat_templates/*.jinja", "[0-9]_*/*"]
"""Exceptions to NESTED: further chat templates, and modules of sentence-transformers (pooling, dense layers)."""
CONFIGS = ("config.json", "adapter_config.json")


class Unreachable(CheckpointError):
    """The hub does not answer, or with an unexpected status."""


def locate(ref: CheckpointRef) -> Path:
    """Return the local folder or .gguf file of a reference without its adapter; hub models get their small files.

    The hub's cache, token and environment variables are used; the cache is tried first.

    Raises:
        UsageError: There is no such model.
        CheckpointError: The download fails.
    """
    local = Path(ref.path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.exists():
        raise UsageError(f"Model {ref.alone} is a file; give its folder (only .gguf files are read alone).")
    if not ref.is_hub_id:
        raise UsageError(f"Model {ref.alone} is neither a local folder nor a hub id of the form org/name.")
    return small_files(ref)


def small_files(ref: CheckpointRef) -> Path:
    """Download a model's config, tokenizer and card as far as they are missing; return its folder in the hub's cache.

    Raises:
        UsageError: The hub has no such model or revision.
        CheckpointError: The download fails.
    """
    from huggingface_hub import constants

    folder, whole = _cached(ref)
    if folder is not None and (whole or constants.HF_HUB_OFFLINE):
        return folder
    if constants.HF_HUB_OFFLINE:
        raise _offline(ref, "is neither a local folder nor in the hub's cache")
    try:
        snapshot = _snapshot(ref, ref.revision, SMALL_FILES)
        if (snapshot / "modules.json").is_file() or (snapshot / "chat_template.jinja").is_file():
            _snapshot(ref, snapshot.name, COMPANIONS, ignore=[])
        return snapshot
    except Exception as error:
        failure = explained(error, ref)
        if folder is not None and isinstance(failure, Unreachable):
            return folder
        raise failure from error


def _cached(ref: CheckpointRef) -> tuple[Path | None, bool]:
    """Return the model's folder in the cache (None where it has no config) and whether all small files are in it."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    whole = True
    try:
        folder = _snapshot(ref, ref.revision, SMALL_FILES, local_files_only=True)
    except IncompleteSnapshotError as error:
        folder, whole = Path(error.snapshot_path), False
    except LocalEntryNotFoundError:
        return None, False
    usable = any((folder / name).is_file() for name in (*CONFIGS, *([ref.file] if ref.file else [])))
    return (folder, whole) if usable else (None, False)


def _snapshot(
    ref: CheckpointRef,
    revision: str | None,
    patterns: list[str],
    local_files_only: bool = False,
    ignore: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        ref.repo,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=None if ref.file in patterns else NESTED if ignore is None else ignore,
        local_files_only=local_files_only,
    )
    return Path(folder)


def fetch(parts: Sequence[Part]) -> None:
    """Download the missing weights of several models, after checking that all exist and that they fit on the disk.

    Local models are skipped.

    Raises:
        CheckpointError, UsageError: Naming the model.
    """
    todo = {part: missing_weights(part) for part in dict.fromkeys(parts) if part.ref.is_hub_id}
    missing = {part: files for part, files in todo.items() if files}
    if missing:
        _check_space(missing)
    for part, files in missing.items():
        try:
            _snapshot(part.ref, part.folder.name, [glob.escape(name) for name in files])
        except Exception as error:
            raise explained(error, part.ref) from error


def _check_space(missing: Mapping[Part, Mapping[str, int]]) -> None:
    from huggingface_hub import constants

    missing_bytes = sum(size for files in missing.values() for size in files.values())
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if free < missing_bytes:
        state = f"{missing_bytes / 1e9:.2f} GB more are needed and {free / 1e9:.2f} GB are free"
        raise _full(", ".join(str(part.ref) for part in missing), state)


def missing_weights(part: Part) -> dict[str, int]:
    """Return {file name: bytes} of a hub model's weights that are not in the cache.

    Raises:
        CheckpointError: The model has no weights, or the hub cannot be reached.
    """
    if _cached_layout(part) is not None:
        return {}
    layout, sizes = _remote_layout(part)
    return {name: sizes[name] for name in layout.files if not (part.folder / name).exists()}


def remote_headers(part: Part) -> dict[str, TensorInfo]:
    """Return the header entries of a hub model; headers of files outside the cache are read over HTTP.

    Raises:
        CheckpointError: The format has no header that can be read alone, or as in `fetch`.
    """
    layout = _cached_layout(part)
    if layout is not None:
        return read_headers(part.folder, layout)
    layout, _ = _remote_layout(part)
    headers = [
        header_of(part.folder / name) if (part.folder / name).exists() else _remote_header(part, name)
        for name in layout.files
    ]
    return join_headers(part.folder, layout, headers)


def _cached_layout(part: Part) -> Layout | None:
    """Return the layout of the weights where the cache holds all of them, else None."""
    try:
        layout = part.layout([file.name for file in part.folder.glob("*")])  # the folder may not exist yet
    except CheckpointError:  # missing shards or a broken index: ask the hub
        return None
    return layout if layout.files and all((part.folder / name).exists() for name in layout.files) else None


def _remote_layout(part: Part) -> tuple[Layout, dict[str, int]]:
    """Return the layout of the weights on the hub, and {file name: bytes} of its files."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _offline(part.ref, "is in the hub's cache without all its weights")
    sizes = _listing(part)
    layout = part.layout([name for name in sizes if "/" not in name])
    absent = [name for name in layout.files if name not in sizes]
    if absent and part.ref.file:
        command = f"`hf models ls {part.ref.repo}` lists its files"
        raise UsageError(f"Model {part.ref.repo} has no file {part.ref.file} on the hub; {command}.")
    if absent:
        raise CheckpointError(f"{part.ref}: its {layout.index} names {absent[0]}, which is not on the hub.")
    if not layout.files:
        raise CheckpointError(part.no_weights(sizes))
    return layout, sizes


def _listing(part: Part) -> dict[str, int]:
    """Return {path: bytes} of the files of a model's commit on the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = HfApi().list_repo_tree(part.ref.repo, recursive=bool(part.ref.file), revision=part.folder.name)
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except Exception as error:
        raise explained(error, part.ref) from error


def _remote_header(part: Part, name: str) -> dict[str, TensorInfo]:
    from huggingface_hub import HfApi

    if not name.endswith(".safetensors"):
        raise HeadersUnknownError(
            f"{part.ref}: the tensors in {name} are unknown before it is downloaded; run `{_command(part.ref)}` first."
        )
    try:
        metadata = HfApi().parse_safetensors_file_metadata(part.ref.repo, name, revision=part.folder.name)
    except Exception as error:
        raise explained(error, part.ref) from error
    return {
        tensor: TensorInfo(tuple(info.shape), DTYPES.get(info.dtype, (info.dtype, 0))[0], part.folder / name)
        for tensor, info in metadata.tensors.items()
    }


def explained(error: BaseException, ref: CheckpointRef) -> ProjectError:
    """Return the project error for a failure of the hub, with the command to run next."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, ProjectError):
        return error
    chain = list(causes(error))
    if any(getattr(e, "errno", None) in DISK_FULL or "os error 28" in str(e) for e in chain):
        return _full(str(ref), "the disk is full")
    status = next((e.response.status_code for e in chain if isinstance(e, hub.HfHubHTTPError)), None)
    if status == 401:
        return CheckpointError(
            f"The hub shows {ref} only after a login (401: no token here, or one that it does not accept; it answers "
            "so for misspelt names too): check the spelling, then run `hf auth login`."
        )
    if status == 403:
        return CheckpointError(
            f"Model {ref} is not open to this account (403): open {constants.ENDPOINT}/{ref.repo}, accept its license "
            "as the account that `hf auth whoami` names, and run this again."
        )
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return UsageError(
            f"Model {ref.repo} has no revision {ref.revision!r} on the hub (404): check the spelling, or leave "
            f"@{ref.revision} out to get its main branch."
        )
    if status == 404:
        name = ref.repo.split("/")[-1]
        return UsageError(
            f"Model {ref} is neither a local folder nor on the hub (404): check the spelling "
            f"(`hf models ls --search {name}` lists models)."
        )
    what = f"status {status}" if status else type(chain[-1]).__name__
    return Unreachable(
        f"Model {ref} is missing or incomplete in the hub's cache, and the hub cannot be reached ({what}); "
        f"run `{_command(ref)}` where there is internet, or give a local folder."
    )


def _command(ref: CheckpointRef) -> str:
    """Return the command that downloads a model into the hub's cache."""
    revision = f" --revision {ref.revision}" if ref.revision else ""
    return f"hf download {ref.repo}{' ' + ref.file if ref.file else ''}{revision}"


def _offline(ref: CheckpointRef, state: str) -> CheckpointError:
    return CheckpointError(
        f"Model {ref} {state}, and HF_HUB_OFFLINE is set; run `{_command(ref)}` where there is internet."
    )


def _full(names: str, state: str) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"No space for the weights of {names} in the hub's cache {constants.HF_HUB_CACHE}: {state}; free some "
        "(`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on a larger disk."
    )
