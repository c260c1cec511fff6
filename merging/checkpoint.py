"""A checkpoint as a lazy mapping from tensor names to tensors, from a folder or a hub id."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}  # fmt: skip
"""safetensors' name of a dtype -> torch's name and bytes per element."""
CODES = {name: code for code, (name, _) in DTYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")
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

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the size in bytes of a tensor of torch dtype name `dtype`."""
    return math.prod(shape) * DTYPES[CODES[dtype]][1]


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; dtype is torch's name ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its files' headers, and tensors read on demand through a memory map."""

    ref: CheckpointRef
    folder: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    commit: str | None = None
    _open_files: dict[Path, Any] = field(default_factory=dict, compare=False, repr=False)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.clear()

    @property
    def name(self) -> str:
        """How messages call this checkpoint."""
        return str(self.ref)

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding (config, then what is stored)."""
        stated = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        if stated is None:  # transformers leaves defaults out of config.json
            return not any(name.endswith("lm_head.weight") for name in self.tensors)
        return bool(stated)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config (a vision-language model nests it)."""
        return self.config.get("text_config", self.config)

    def read(self, name: str) -> Tensor:
        """Return the tensor as stored, memory-mapped, on the CPU. Raises CheckpointError where it cannot be read."""
        info = self.tensors[name]
        try:
            if info.file.suffix == ".safetensors":
                return self._safetensors(info.file).get_tensor(name)
            return self._pickled(info.file)[name]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read ({error}).") from error

    def _safetensors(self, file: Path) -> Any:
        if file not in self._open_files:
            from safetensors import safe_open

            self._open_files[file] = safe_open(str(file), framework="pt")
        return self._open_files[file]

    def _pickled(self, file: Path) -> Mapping[str, Tensor]:
        if file not in self._open_files:
            self._open_files[file] = load_pickled(file)
        return self._open_files[file]


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Memory-map a PyTorch .bin of tensors, refusing anything that would need arbitrary unpickling."""
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and is not unpickled, because a pickle can run code; "
            "convert it to safetensors on a machine where you trust it."
        ) from error
    except RuntimeError:  # written before torch 1.6: no memory map of that format
        return torch.load(file, map_location="cpu", weights_only=True)


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
            shards = read_json(folder / name, "").get("weight_map", {}) if name.endswith(".json") else {}
            return all((folder / shard).exists() for shard in shards.values())
    return any(folder.glob("*.safetensors"))


def open_all(names: Sequence[str]) -> list[Checkpoint]:
    """Open several checkpoints; every one of them is found before the first weight is downloaded."""
    for name in names:
        locate(CheckpointRef.parse(name), weights=False)
    return [open_checkpoint(name) for name in names]


def open_checkpoint(text: str) -> Checkpoint:
    """Open a checkpoint by folder or hub id, reading headers only.

    Raises UsageError for a model that does not exist, CheckpointError for files that are missing or broken.
    """
    ref = CheckpointRef.parse(text)
    folder = locate(ref, weights=True)
    config = read_json(folder / "config.json", f"{ref} has no config.json; it is not a model folder.")
    if config.get("quantization_config"):
        raise CheckpointError(f"{ref} is quantised (config.json has quantization_config); dequantise it first.")
    tensors = _tensors(folder)
    commit = folder.name if ref.is_hub_id and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Checkpoint(ref, folder, tensors, config, commit)


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError with the sentence `missing`, or naming a broken file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(missing) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} should hold a JSON object.")
    return data


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    index = next((folder / n for n in WEIGHT_FILES if n.endswith(".json") and (folder / n).exists()), None)
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index is not None:
        weight_map = read_json(index, "").get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin, whole or sharded).")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{index} names {file.name}, which is not in the folder; download it again.")
        for name, info in _headers(file).items():
            if name in tensors:
                raise CheckpointError(f"Tensor {name} is in both {tensors[name].file.name} and {file.name}.")
            tensors[name] = info
    if index is not None and index.exists() and len(files) > 1:
        lacking = [name for name in weight_map if name not in tensors]
        if lacking:
            raise CheckpointError(f"{index} names tensor {lacking[0]}, which is in no file ({len(lacking)} such).")
    return tensors


def _headers(file: Path) -> dict[str, TensorInfo]:
    if file.suffix != ".safetensors":
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)
            for name, tensor in load_pickled(file).items()
        }
    size = os.path.getsize(file)
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((spec["data_offsets"][1] for spec in header.values()), default=0) + 8 + length
        if end > size:
            raise ValueError(f"{end} bytes expected, {size} found: cut short")
    except (ValueError, struct.error, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again.") from error
    return {
        name: TensorInfo(tuple(spec["shape"]), DTYPES.get(spec["dtype"], (spec["dtype"], 0))[0], file)
        for name, spec in header.items()
    }
