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

from console.errors import CheckpointError
from console.files import read_json
from merging.hub import WEIGHT_FILES, CheckpointRef, locate, shards_of, weight_map

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
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

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
    """Memory-map a PyTorch .bin of tensors, refusing anything that would need arbitrary unpickling.

    Raises CheckpointError for such a file, for one that is broken, and for one that is no mapping of names to tensors.
    """
    import pickle

    import torch

    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no memory map of that format
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and is not unpickled, because a pickle can run code; "
            "convert it to safetensors on a machine where you trust it."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        what = first_line(error)
        raise CheckpointError(f"{file} is not a whole PyTorch file ({what}); download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file} should map names to tensors (a state dict), and does not.")
    return state


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    index = next((folder / n for n in WEIGHT_FILES if n.endswith(".json") and (folder / n).exists()), None)
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index is not None:
        files = [folder / name for name in shards_of(index)]
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
        lacking = [name for name in weight_map(index) if name not in tensors]
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
        return {
            name: TensorInfo(tuple(spec["shape"]), DTYPES.get(spec["dtype"], (spec["dtype"], 0))[0], file)
            for name, spec in header.items()
        }
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again.") from error
