"""Layout of a result's tensors in safetensors files: file, offset and size of each."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files.atomic import naming, write_file
from merging.checkpoints.storage import CODES, tensor_bytes
from merging.plan.types import Named

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shards:
    """The files of a result: their names, the tensors of each, and every tensor's place, in the plan's order."""

    names: tuple[str, ...]
    tensors: tuple[tuple[Named, ...], ...]
    places: tuple[Place, ...]

    def header(self, shard: int) -> bytes:
        """The first bytes of a file."""
        return header_bytes(self.tensors[shard])

    def write_index(self, folder: Path) -> None:
        """Write which file has which tensor, where there are several."""
        if len(self.names) == 1:
            return
        weight_map = {t.name: name for name, shard in zip(self.names, self.tensors, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(place.size for place in self.places)}, "weight_map": weight_map}
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def size(self, shard: int) -> int:
        """Return the bytes of a file, its header among them."""
        return len(self.header(shard)) + sum(place.size for place in self.places if place.shard == shard)

    def allocate(self, folder: Path) -> None:
        """Make every file in its size, for several processes to write into; what is there already stays.

        Their first bytes are zero: what is not whole is no safetensors file.
        """
        for shard, name in enumerate(self.names):
            size = self.size(shard)
            with naming(folder / name):
                handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
                try:
                    os.pwrite(handle, bytes(8), 0)
                    os.truncate(handle, size)
                finally:
                    os.close(handle)

    def seal(self, folder: Path) -> None:
        """Write the header of every file whose tensors are all there."""
        for shard in range(len(self.names)):
            self.complete(folder, shard)

    def complete(self, folder: Path, shard: int) -> None:
        """Write the header of a file whose tensors are all there, and cut what is behind them."""
        file = folder / self.names[shard]
        with naming(file):
            handle = os.open(file, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                os.pwrite(handle, self.header(shard), 0)
                os.ftruncate(handle, self.size(shard))
                os.fsync(handle)
            finally:
                os.close(handle)


def lay_out(tensors: Sequence[Named], max_shard_bytes: float, stem: str = "model") -> Shards:
    """Return the files of at most `max_shard_bytes` of tensors each that hold the tensors in their order."""
    shards = tuple(tuple(shard) for shard in split_shards(tensors, max_shard_bytes))
    places = tuple(place for i, shard in enumerate(shards) for place in _places(i, shard))
    return Shards(tuple(shard_names(len(shards), stem)), shards, places)


def _places(shard: int, tensors: Sequence[Named]) -> Iterator[Place]:
    offset = len(header_bytes(tensors))
    for tensor in tensors:
        size = tensor_bytes(tensor.shape, tensor.dtype)
        yield Place(tensor.name, tensor.shape, tensor.dtype, shard, offset, size)
        offset += size


@dataclass(frozen=True)
class Place:
    """Place of a tensor's bytes: shard number, offset in its file, size in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


def header_bytes(tensors: Sequence[Named]) -> bytes:
    """Return the first bytes of a safetensors file of these tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor_bytes(tensor.shape, tensor.dtype)
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def shard_names(count: int, stem: str = "model") -> list[str]:
    """Return the file names of `count` shards, as transformers writes them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def split_shards(tensors: Sequence[Named], max_shard_bytes: float) -> list[list[Named]]:
    """Cut the tensors, in order, into shards of at most `max_shard_bytes` (one tensor may exceed it alone)."""
    shards: list[list[Named]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_bytes(tensor.shape, tensor.dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
