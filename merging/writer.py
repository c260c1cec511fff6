"""Writing a checkpoint's tensors into sharded safetensors files, block by block."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from console.errors import CheckpointError, UsageError
from merging.digests import block_bytes, digest_of
from merging.planned import Named
from merging.stage import Journal
from merging.stored import CODES, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return bytes for "5GB", "200MB", "1GiB" or a plain number. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max_shard_size must be a size such as 5GB or 200MB, found {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


class ShardedWriter:
    """Writes tensors in the plan's order into safetensors files of at most `max_shard_bytes` each, block by block.

    Headers are written first, from the plan, so that each block's bytes go straight to the file and no tensor is ever
    held in memory. A finished tensor is entered in the journal with its digest (sha256 of its bytes); a writer over the
    journal of an interrupted run takes up after the last tensor whose bytes are there and have their digest.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Named], max_shard_bytes: float, journal: Journal, stem: str = "model"
    ) -> None:
        self.folder, self.journal = folder, journal
        self._shards = split_shards(tensors, max_shard_bytes)
        self._names = shard_names(len(self._shards), stem)
        self._places = [place for i, shard in enumerate(self._shards) for place in self._lay_out(i, shard)]
        self._ends = list(accumulate((place.size for place in self._places), initial=0))
        self._stream: BinaryIO | None = None
        self._shard = -1
        self._current: BinaryIO
        self._digest, self._written = hashlib.sha256(), 0
        self._next = self._verified()

    @property
    def done(self) -> int:
        """How many tensors of the plan are written."""
        return self._next

    @property
    def part(self) -> float:
        """Which part of all the bytes is written."""
        return self._ends[self._next] / max(1, self._ends[-1])

    def rewind(self, done: int) -> None:
        """Go on as if only the first `done` tensors were written."""
        self._next = min(self._next, done)
        self.journal.keep(self._next)

    def begin(self, name: str) -> None:
        """Start the next tensor of the plan. Raises CheckpointError where it is not the one that was planned."""
        place = self._places[self._next]
        if name != place.name:
            raise CheckpointError(f"Tensor {name} came where {place} was planned.")
        self._current = self._at(place)
        self._digest, self._written = hashlib.sha256(), 0

    def add(self, block: Tensor) -> None:
        """Write the tensor's next rows. Raises CheckpointError where they are of another dtype than planned."""
        place = self._places[self._next]
        dtype = str(block.dtype).removeprefix("torch.")
        if dtype != place.dtype:
            raise CheckpointError(f"Tensor {place.name} {dtype} {list(block.shape)} came where {place} was planned.")
        data = block_bytes(block)
        self._current.write(data)
        self._digest.update(data)
        self._written += data.nbytes

    def end(self, remark: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Finish the tensor and enter it in the journal with a remark.

        Raises CheckpointError where it is not as large as planned.
        """
        place = self._places[self._next]
        if self._written != place.size:
            raise CheckpointError(f"Tensor {place.name} of {self._written} bytes came where {place} was planned.")
        self._current.flush()
        self._next += 1
        self.journal.add({"name": place.name, "sha256": self._digest.hexdigest(), **remark})

    def close(self) -> None:
        """Finish the last shard and write the index. Raises CheckpointError where tensors are missing."""
        if self._next != len(self._places):
            raise CheckpointError(f"Tensor {self._places[self._next].name} was planned and never written.")
        if self._stream is not None:
            self._stream.close()
        if len(self._shards) > 1:
            weight_map = {t.name: self._names[i] for i, shard in enumerate(self._shards) for t in shard}
            total = sum(place.size for place in self._places)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _lay_out(self, shard: int, tensors: Sequence[Named]) -> Iterator[Place]:
        offset = len(header_bytes(tensors))
        for tensor in tensors:
            size = tensor_bytes(tensor.shape, tensor.dtype)
            yield Place(tensor.name, tensor.shape, tensor.dtype, shard, offset, size)
            offset += size

    def _verified(self) -> int:
        """Count the tensors that an interrupted run finished; what its journal has after them is dropped."""
        done = 0
        for entry, place in zip(self.journal.entries, self._places, strict=False):
            file = self.folder / self._names[place.shard]
            if entry["name"] != place.name or digest_of(file, place.offset, place.size) != entry["sha256"]:
                break
            done += 1
        self.journal.keep(done)
        return done

    def _at(self, place: Place) -> BinaryIO:
        """The stream of the place's shard, at the place."""
        if self._stream is None or self._shard != place.shard:
            if self._stream is not None:
                self._stream.close()
            file = self.folder / self._names[place.shard]
            header = header_bytes(self._shards[place.shard])
            first = place.offset == len(header)
            self._stream = file.open("wb" if first else "r+b")
            self._shard = place.shard
            if first:
                self._stream.write(header)
            self._stream.truncate(place.offset)
            self._stream.seek(place.offset)
        return self._stream


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes go: shard number, offset in its file, size in bytes."""

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
