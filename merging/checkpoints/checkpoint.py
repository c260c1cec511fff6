"""A checkpoint as a lazy mapping from names to tensors: a folder, a .gguf file or a hub id, perhaps with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, HeadersUnknownError, UsageError
from common.files.file_state import FileState, states_of
from common.files.paths import read_json
from merging.checkpoints.adapters.adapter import adapt
from merging.checkpoints.adapters.adapter_config import check_adapter
from merging.checkpoints.headers import read_headers
from merging.checkpoints.hub import CheckpointRef, Part, locate
from merging.checkpoints.model_config import (
    license_details,
    stated_licenses,
    text_config_of,
    ties_embeddings,
    with_changes,
)
from merging.checkpoints.model_folder import check_folder
from merging.checkpoints.parsed_config import ParsedConfig, parse_config
from merging.checkpoints.quantized.weights import dequantized
from merging.checkpoints.storage import CODES, FLOATS, StoredWeights, TensorInfo, Weights, tensor_bytes
from merging.checkpoints.tempdir import overlay
from merging.checkpoints.tokenizer_files import tokenizer_files

if TYPE_CHECKING:
    from torch import Tensor

    from merging.checkpoints.row_source import Rows

__all__ = [
    "CODES", "FLOATS", "Checkpoint", "CheckpointRef", "TensorInfo", "open_all", "open_checkpoint", "tensor_bytes",
]  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: what its headers say, and tensors read on demand.

    folder: where its config, tokenizer and generation config are, which for a .gguf file or an adapter with a tokenizer
    is a folder of this run; parts: the model, and the adapter if there is one; places: what the user named, for each;
    reading: sentences on weights that are dequantized; states: of its files when they were opened.
    """

    ref: CheckpointRef
    folder: Path
    weights: Weights
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    places: tuple[Path, ...]
    reading: tuple[str, ...] = ()
    states: Mapping[Path, FileState] = field(default_factory=dict, compare=False)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.weights.close()

    @property
    def name(self) -> str:
        """How messages call this checkpoint."""
        return str(self.ref)

    @property
    def exact_name(self) -> str:
        """Absolute paths, or hub ids with the commits that were read; parses to this very checkpoint."""
        return "+".join(part.exact_name for part in self.parts)

    @property
    def commit(self) -> str | None:
        """The commit of a model from the hub (of the base, where there is an adapter)."""
        return self.parts[0].commit

    @property
    def place(self) -> Path:
        """The folder or .gguf file that the user named, or its folder in the hub's cache."""
        return self.places[0]

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
        stated = (license for part in self.parts for license in stated_licenses(part.folder / "README.md"))
        return tuple(dict.fromkeys(stated))

    @cached_property
    def license_details(self) -> tuple[Mapping[str, str], ...]:
        """`license`, `license_name` and `license_link` of its parts' model cards, for those that state one."""
        details = (license_details(part.folder / "README.md", part.ref) for part in self.parts)
        return tuple(detail for detail in details if detail)

    @cached_property
    def ties_embeddings(self) -> bool:
        """Whether the output embedding is the input embedding (config, then what is stored)."""
        return ties_embeddings(self.config, self.tensors)

    @cached_property
    def parsed_config(self) -> ParsedConfig:
        """The config with transformers' defaults filled in."""
        return parse_config(self.config)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config (a vision-language model nests it)."""
        return text_config_of(self.config)

    @property
    def loads_from_folder(self) -> bool:
        """Whether transformers finds these very weights in `folder`: no adapter, and not a .gguf file."""
        return isinstance(self.weights, StoredWeights)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on how the weights are read: dequantized, or an adapter on another base than it was trained on.

        Bases are compared by the last part of their names, since a base may have been moved, or come from elsewhere.
        """
        trained = getattr(self.weights, "trained_on", None)
        if not trained or Path(trained).name == Path(self.ref.alone.path).resolve().name:
            return self.reading
        other = f"{self.ref.adapter} was trained on {trained}, by its config; it is added to {self.ref.alone}."
        return (*self.reading, other)

    def rows(self, name: str) -> Rows:
        """Return a tensor to be read in blocks of rows: a stored one memory-mapped, an adapted one computed in fp32.

        Raises CheckpointError where it cannot be read.
        """
        return self.weights.rows(name)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU. Raises CheckpointError where it cannot be read."""
        import torch

        rows = self.rows(name)
        return rows if isinstance(rows, torch.Tensor) else rows[slice(None)]


@dataclass(frozen=True)
class _Found:
    """A reference whose small files are here and whose configs can be used; no weights are needed yet."""

    ref: CheckpointRef
    parts: tuple[Part, ...]
    places: tuple[Path, ...]
    gguf: Path | None
    config: Mapping[str, Any]
    adapter_config: Mapping[str, Any]


def open_all(names: Sequence[str], headers_only: bool = False, adapters_only: bool = False) -> list[Checkpoint]:
    """Open several checkpoints, reading headers only; all are found and checked before a weight is downloaded.

    headers_only: download no weights at all; such checkpoints can be described and not read. adapters_only: download
    those of adapters, and of the models below them headers only. Raises UsageError for a model that does not exist,
    CheckpointError for files that are missing, broken or cannot be merged.
    """
    from merging.checkpoints.download import fetch

    found = [_find(CheckpointRef.parse(name)) for name in names]
    if not headers_only:
        fetch([part for one in found for part in one.parts if part.is_adapter or not adapters_only])
    return [_open(one, headers_only, headers_only or adapters_only) for one in found]


def open_checkpoint(text: str) -> Checkpoint:
    """Open one checkpoint by folder, .gguf file or hub id, or base+adapter. Raises as `open_all` does."""
    return open_all([text])[0]


def _find(ref: CheckpointRef) -> _Found:
    place = locate(ref)
    base = Part(ref.alone, place.parent if place.is_file() else place)
    gguf = _gguf_of(base, place)
    config: Mapping[str, Any] = {}
    if not place.is_file():
        check_folder(place)
    if gguf is None:
        beside = place / "adapter_config.json"
        if beside.is_file() and not (place / "config.json").is_file():
            trained = read_json(beside, "").get("base_model_name_or_path")
            raise UsageError(f"{ref.alone} is an adapter; give it with its base ({trained}) as BASE+{ref.alone}.")
        config = read_json(place / "config.json", _no_config(base))
    if ref.adapter is None:
        return _Found(ref, (base,), (place,), gguf, config, {})
    home = locate(ref.adapter)
    check_folder(home)
    missing = f"{ref.adapter} is not an adapter (it has no adapter_config.json); separate models by commas."
    adapter_config = read_json(home / "adapter_config.json", missing)
    check_adapter(str(ref.adapter), adapter_config)
    return _Found(ref, (base, Part(ref.adapter, home, True)), (place, home), gguf, config, adapter_config)


def _no_config(base: Part) -> str:
    """The sentence on a folder without config.json."""
    names = [file.name for file in base.folder.glob("*")]
    if any(name.endswith(".gguf") for name in names):
        return base.no_weights(names)
    hint = f" (one of several .gguf files is named as {base.ref.path}/file.gguf)" if base.ref.is_hub_id else ""
    return f"{base.ref} has no config.json; it is not a model folder{hint}."


def _gguf_of(base: Part, place: Path) -> Path | None:
    """The .gguf file that a place is, that a hub id names, or that a local folder holds without other weights."""
    if base.ref.file:
        return place / base.ref.file
    if place.is_file() or base.ref.is_hub_id:
        return place if place.is_file() else None
    names = [file.name for file in place.iterdir()]
    alone = [name for name in names if name.endswith(".gguf")]
    return place / alone[0] if len(alone) == 1 and not base.layout(names).files else None


def _open(found: _Found, headers_only: bool, base_headers_only: bool) -> Checkpoint:
    base, label = found.parts[0], str(found.ref.alone)
    weights: Weights
    config, folder = found.config, base.folder
    note: str | None = None
    if found.gguf is not None:
        if base_headers_only and not found.gguf.exists():
            raise HeadersUnknownError(f"{label}: the tensors of a .gguf file are unknown before it is downloaded.")
        from merging.checkpoints.gguf import open_gguf

        weights, config, folder = open_gguf(label, found.gguf)
    else:
        weights, config, note = dequantized(label, config, _stored(base, base_headers_only))
    if len(found.parts) > 1:
        adapter = found.parts[1]
        names, ties = (label, str(adapter.ref)), ties_embeddings(config, weights.tensors)
        file = adapter.folder / "adapter_config.json"
        theirs = _stored(adapter, headers_only)
        weights = adapt(names, weights, ties, theirs, found.adapter_config, file, config)
        config, folder = with_changes(config, weights.config_changes), overlay(folder, adapter.folder)
    reading = () if note is None else (note,)
    small = [file for part in found.parts for file in (part.folder / "config.json", *tokenizer_files(part.folder))]
    states = states_of([*weights.files, *small])
    return Checkpoint(found.ref, folder, weights, config, found.parts, found.places, reading, states)


def _stored(part: Part, headers_only: bool) -> StoredWeights:
    if headers_only and part.ref.is_hub_id:
        from merging.checkpoints.download import remote_headers

        return StoredWeights(remote_headers(part))
    names = [file.name for file in part.folder.iterdir()]
    layout = part.layout(names)
    if not layout.files:
        raise CheckpointError(part.no_weights(names))
    return StoredWeights(read_headers(part.folder, layout))
