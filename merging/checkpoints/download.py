"""Getting a model from the hub: small files first, weights where they are lacking; every failure in one sentence."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import DISK_FULL, CheckpointError, HeadersUnknownError, ProjectError, UsageError, causes
from merging.checkpoints.headers import Layout, header_of, read_headers, united
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
"""Subfolders hold other formats (onnx/, original/) and are not fetched."""
COMPANIONS = ["additional_chat_templates/*.jinja", "[0-9]_*/*"]
"""But for these: further chat templates, and the modules of sentence-transformers (pooling, dense layers)."""
CONFIGS = ("config.json", "adapter_config.json")


class Unreachable(CheckpointError):
    """The hub does not answer, or not sensibly."""


def small_files(ref: CheckpointRef) -> Path:
    """Return the folder in the hub's cache with a model's config, tokenizer and card, fetched where it lacks them.

    Raises UsageError where the hub has no such model or revision, CheckpointError where it cannot give it.
    """
    from huggingface_hub import constants

    folder, whole = _cached(ref)
    if folder is not None and (whole or constants.HF_HUB_OFFLINE):
        return folder
    if constants.HF_HUB_OFFLINE:
        raise _offline(ref, "is neither a local folder nor in the hub's cache")
    try:
        found = _snapshot(ref, ref.revision, SMALL_FILES)
        if (found / "modules.json").is_file() or (found / "chat_template.jinja").is_file():
            _snapshot(ref, found.name, COMPANIONS, ignore=[])
        return found
    except Exception as error:
        failure = explained(error, ref)
        if folder is not None and isinstance(failure, Unreachable):
            return folder
        raise failure from error


def _cached(ref: CheckpointRef) -> tuple[Path | None, bool]:
    """The folder in the cache, if it can be used at all, and whether all the small files are in it."""
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

    found = snapshot_download(
        ref.repo,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=None if ref.file in patterns else NESTED if ignore is None else ignore,
        local_files_only=local_files_only,
    )
    return Path(found)


def fetch(parts: Sequence[Part]) -> None:
    """Download the weights that several models lack, after finding that all can be had and that the disk holds them.

    Local models are left alone. Raises CheckpointError or UsageError naming the model.
    """
    todo = {part: missing_weights(part) for part in dict.fromkeys(parts) if part.ref.is_hub_id}
    lacking = {part: files for part, files in todo.items() if files}
    if lacking:
        _check_space(lacking)
    for part, files in lacking.items():
        try:
            _snapshot(part.ref, part.folder.name, [glob.escape(name) for name in files])
        except Exception as error:
            raise explained(error, part.ref) from error


def _check_space(lacking: Mapping[Part, Mapping[str, int]]) -> None:
    from huggingface_hub import constants

    needed = sum(size for files in lacking.values() for size in files.values())
    cache = Path(constants.HF_HUB_CACHE).absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if free < needed:
        state = f"{needed / 1e9:.2f} GB more are needed and {free / 1e9:.2f} GB are free"
        raise _full(", ".join(str(part.ref) for part in lacking), state)


def missing_weights(part: Part) -> dict[str, int]:
    """Return {file: bytes} of the weights that a model from the hub still lacks in the cache.

    Raises CheckpointError where it has none at all, or where they are lacking and the hub cannot be asked.
    """
    if _whole_here(part) is not None:
        return {}
    layout, sizes = _remote_layout(part)
    return {name: sizes[name] for name in layout.files if not (part.folder / name).exists()}


def remote_headers(part: Part) -> dict[str, TensorInfo]:
    """Return what the headers of a model on the hub say, of files that are not in the cache without fetching them.

    Raises CheckpointError for formats whose headers cannot be read alone, and as `fetch` does.
    """
    layout = _whole_here(part)
    if layout is not None:
        return read_headers(part.folder, layout)
    layout, _ = _remote_layout(part)
    found = [
        header_of(part.folder / name) if (part.folder / name).exists() else _remote_header(part, name)
        for name in layout.files
    ]
    return united(part.folder, layout, found)


def _whole_here(part: Part) -> Layout | None:
    """The layout of the weights in the cache where all of them are there."""
    try:
        layout = part.layout([file.name for file in part.folder.glob("*")])  # the folder may be yet to come
    except CheckpointError:  # some of the shards, or a broken index: the hub knows better
        return None
    return layout if layout.files and all((part.folder / name).exists() for name in layout.files) else None


def _remote_layout(part: Part) -> tuple[Layout, dict[str, int]]:
    """The layout of the weights on the hub, and {file: bytes} of all that is there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _offline(part.ref, "is in the hub's cache without all its weights")
    sizes = _listing(part)
    layout = part.layout([name for name in sizes if "/" not in name])
    absent = [name for name in layout.files if name not in sizes]
    if absent and part.ref.file:
        seen = f"`hf models ls {part.ref.repo}` lists its files"
        raise UsageError(f"Model {part.ref.repo} has no file {part.ref.file} on the hub; {seen}.")
    if absent:
        raise CheckpointError(f"{part.ref}: its {layout.index} names {absent[0]}, which is not on the hub.")
    if not layout.files:
        raise CheckpointError(part.no_weights(sizes))
    return layout, sizes


def _listing(part: Part) -> dict[str, int]:
    """{path: bytes} of the files of a model's commit on the hub."""
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
        found = HfApi().parse_safetensors_file_metadata(part.ref.repo, name, revision=part.folder.name)
    except Exception as error:
        raise explained(error, part.ref) from error
    return {
        tensor: TensorInfo(tuple(info.shape), DTYPES.get(info.dtype, (info.dtype, 0))[0], part.folder / name)
        for tensor, info in found.tensors.items()
    }


def explained(error: BaseException, ref: CheckpointRef) -> ProjectError:
    """Return what a failure of the hub means for the user, and the command to run next."""
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
            f"(`hf models ls --search {name}` lists what is there)."
        )
    what = f"status {status}" if status else type(chain[-1]).__name__
    return Unreachable(
        f"Model {ref} is missing or incomplete in the hub's cache, and the hub cannot be reached ({what}); "
        f"run `{_command(ref)}` where there is internet, or give a local folder."
    )


def _command(ref: CheckpointRef) -> str:
    """The command that puts a model into the hub's cache."""
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
