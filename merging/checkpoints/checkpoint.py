"""Checkpoints as lazy mappings from tensor names to tensors: folders, .gguf files, hub ids, with or without adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError, HeadersUnknownError, UsageError
from common.files.file_state import FileState, states_of
from common.files.json_values import JsonValue
from common.files.paths import read_json
from merging.checkpoints.adapters.adapter import adapt
from merging.checkpoints.adapters.adapter_config import check_adapter
from merging.checkpoints.download import locate
from merging.checkpoints.headers import read_headers
from merging.checkpoints.hub import CheckpointRef, Part
from merging.checkpoints.model_config import (
    license_details,
    stated_licenses,
    text_config_of,
    ties_embeddings,
    with_changes,
)
from merging.checkpoints.model_folder import check_folder, tokenizer_files, with_tokenizer_of
from merging.checkpoints.parsed_config import ParsedConfig, parse_config
from merging.checkpoints.quantized.weights import dequantized
from merging.checkpoints.storage import CODES, FLOATS, Rows, StoredWeights, TensorInfo, Weights, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CODES", "FLOATS", "Checkpoint", "CheckpointRef", "TensorInfo", "open_all", "open_checkpoint", "tensor_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with its headers in memory; tensors are read on demand.

    Attributes:
        ref: The reference that the user gave.
        folder: Folder of config, tokenizer and generation config; a temporary one for a .gguf file, and for an adapter
            that brings a tokenizer.
        weights: Tensors by name.
        config: Content of config.json.
        parts: The model, and the adapter if there is one.
        reading: Notes on dequantized weights.
        states: Size, time and inode of each file when it was opened.
    """

    ref: CheckpointRef
    folder: Path
    weights: Weights
    config: Mapping[str, JsonValue]
    parts: tuple[Part, ...]
    reading: tuple[str, ...] = ()
    states: Mapping[Path, FileState] = field(default_factory=dict, compare=False)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.weights.close()

    @property
    def name(self) -> str:
        """Name of this checkpoint in messages."""
        return str(self.ref)

    @property
    def exact_name(self) -> str:
        """Absolute paths, or hub ids with the commits that were read; it parses to the same checkpoint."""
        return "+".join(part.exact_name for part in self.parts)

    @property
    def commit(self) -> str | None:
        """Commit of a model from the hub (of the base, where there is an adapter)."""
        return self.parts[0].commit

    @property
    def place(self) -> Path:
        """Local path of the model: the folder or .gguf file that the user named, or a folder of the hub's cache."""
        return self.parts[0].place

    @property
    def places(self) -> tuple[Path, ...]:
        """Local path of each part."""
        return tuple(part.place for part in self.parts)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, by name."""
        return self.weights.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that its weights come from, sorted."""
        return tuple(self.weights.files)

    @cached_property
    def licenses(self) -> tuple[str, ...]:
        """The licenses that the model cards of its parts state, each once."""
        licenses = (license for part in self.parts for license in stated_licenses(part.folder / "README.md"))
        return tuple(dict.fromkeys(licenses))

    @cached_property
    def license_details(self) -> tuple[Mapping[str, str], ...]:
        """`license`, `license_name` and `license_link` of its parts' model cards, for those that state one."""
        details = (license_details(part.folder / "README.md", part.ref) for part in self.parts)
        return tuple(detail for detail in details if detail)

    @cached_property
    def ties_embeddings(self) -> bool:
        """True where the output head shares the input embedding, by the config or else by the stored tensors."""
        return ties_embeddings(self.config, self.tensors)

    @cached_property
    def main_dtype(self) -> str:
        """Floating-point dtype of most bytes of the tensors; float32 where there are no such tensors."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in FLOATS:
                sizes[info.dtype] += tensor_bytes(info.shape, info.dtype)
        return sizes.most_common(1)[0][0] if sizes else "float32"

    @cached_property
    def parsed_config(self) -> ParsedConfig:
        """The config with transformers' defaults filled in."""
        return parse_config(self.config)

    @property
    def text_config(self) -> Mapping[str, JsonValue]:
        """The language model's part of the config (a vision-language model nests it)."""
        return text_config_of(self.config)

    @property
    def loads_from_folder(self) -> bool:
        """True where transformers loads the same weights from `folder`: no adapter and no .gguf file."""
        return isinstance(self.weights, StoredWeights)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on dequantized weights, and on an adapter whose config names another base.

        Bases are compared by the last component of their names, since paths and organizations differ between machines.
        """
        trained = getattr(self.weights, "trained_on", None)
        if not trained or Path(trained).name == Path(self.ref.alone.path).resolve().name:
            return self.reading
        note = f"{self.ref.adapter} was trained on {trained}, by its config; it is added to {self.ref.alone}."
        return (*self.reading, note)

    def rows(self, name: str) -> Rows:
        """Return a tensor that is read in blocks of rows: memory-mapped, or computed in fp32 for adapted tensors.

        Raises:
            CheckpointError: The tensor cannot be read.
        """
        return self.weights.rows(name)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU. Raises CheckpointError where it cannot be read."""
        import torch

        rows = self.rows(name)
        return rows if isinstance(rows, torch.Tensor) else rows[slice(None)]


def open_all(names: Sequence[str], headers_only: bool = False, adapters_only: bool = False) -> list[Checkpoint]:
    """Open several checkpoints; all are located and checked before any weights are downloaded.

    Args:
        names: References: folders, .gguf files or hub ids, with an adapter as BASE+ADAPTER.
        headers_only: Download no weights; such checkpoints can be planned with but not read.
        adapters_only: Download the weights of adapters, and only headers of their bases.

    Raises:
        UsageError: A model does not exist.
        CheckpointError: Files are missing or broken, or have a format that cannot be merged.
    """
    from merging.checkpoints.download import fetch

    refs = [CheckpointRef.parse(name) for name in names]
    parts_by_model = [_find_parts(ref) for ref in refs]
    if not headers_only:
        fetch([part for parts in parts_by_model for part in parts if part.is_adapter or not adapters_only])
    base_headers_only = headers_only or adapters_only
    return [_open(ref, parts, headers_only, base_headers_only) for ref, parts in zip(refs, parts_by_model, strict=True)]


def open_checkpoint(text: str) -> Checkpoint:
    """Open one checkpoint by folder, .gguf file or hub id, or base+adapter. Raises as `open_all` does."""
    return open_all([text])[0]


def _find_parts(ref: CheckpointRef) -> tuple[Part, ...]:
    """Return the model and the adapter of a reference; their small files are local then, their weights may be absent.

    Raises as `open_all` does.
    """
    model = _find_model(ref.alone)
    if ref.adapter is None:
        return (model,)
    folder = locate(ref.adapter)
    check_folder(folder)
    missing = f"{ref.adapter} is not an adapter (it has no adapter_config.json); separate models by commas."
    config = read_json(folder / "adapter_config.json", missing)
    check_adapter(str(ref.adapter), config)
    return model, Part(ref.adapter, folder, folder, config, is_adapter=True)


def _find_model(ref: CheckpointRef) -> Part:
    place = locate(ref)
    part = Part(ref, place.parent if place.is_file() else place, place, {})
    if not place.is_file():
        check_folder(place)
    if (gguf := _gguf_of(part)) is not None:
        return replace(part, gguf=gguf)
    adapter_config = place / "adapter_config.json"
    if adapter_config.is_file() and not (place / "config.json").is_file():
        trained = read_json(adapter_config, "").get("base_model_name_or_path")
        raise UsageError(f"{ref} is an adapter; give it with its base ({trained}) as BASE+{ref}.")
    return replace(part, config=read_json(place / "config.json", _no_config(part)))


def _no_config(base: Part) -> str:
    """Return the message for a folder without config.json."""
    names = [file.name for file in base.folder.glob("*")]
    if any(name.endswith(".gguf") for name in names):
        return base.no_weights(names)
    hint = f" (one of several .gguf files is named as {base.ref.path}/file.gguf)" if base.ref.is_hub_id else ""
    return f"{base.ref} has no config.json; it is not a model folder{hint}."


def _gguf_of(part: Part) -> Path | None:
    """Return the .gguf file of a model; None where the weights are in other formats."""
    place = part.place
    if part.ref.file:
        return place / part.ref.file
    if place.is_file() or part.ref.is_hub_id:
        return place if place.is_file() else None
    names = [file.name for file in place.iterdir()]
    alone = [name for name in names if name.endswith(".gguf")]
    return place / alone[0] if len(alone) == 1 and not part.layout(names).files else None


def _open(ref: CheckpointRef, parts: tuple[Part, ...], headers_only: bool, base_headers_only: bool) -> Checkpoint:
    base, label = parts[0], str(ref.alone)
    weights: Weights
    config, folder = base.config, base.folder
    note: str | None = None
    if base.gguf is not None:
        if base_headers_only and not base.gguf.exists():
            raise HeadersUnknownError(f"{label}: the tensors of a .gguf file are unknown before it is downloaded.")
        from merging.checkpoints.gguf import open_gguf

        weights, config, folder = open_gguf(label, base.gguf)
    else:
        weights, config, note = dequantized(label, config, _stored(base, base_headers_only))
    for adapter in parts[1:]:
        names, ties = (label, str(adapter.ref)), ties_embeddings(config, weights.tensors)
        file = adapter.folder / "adapter_config.json"
        weights = adapt(names, weights, ties, _stored(adapter, headers_only), adapter.config, file, config)
        config, folder = with_changes(config, weights.config_changes), with_tokenizer_of(folder, adapter.folder)
    reading = () if note is None else (note,)
    small = [file for part in parts for file in (part.folder / "config.json", *tokenizer_files(part.folder))]
    states = states_of([*weights.files, *small])
    return Checkpoint(ref, folder, weights, config, parts, reading, states)


def _stored(part: Part, headers_only: bool) -> StoredWeights:
    if headers_only and part.ref.is_hub_id:
        from merging.checkpoints.download import remote_headers

        return StoredWeights(remote_headers(part))
    names = [file.name for file in part.folder.iterdir()]
    layout = part.layout(names)
    if not layout.files:
        raise CheckpointError(part.no_weights(names))
    return StoredWeights(read_headers(part.folder, layout))
