"""Writing a checkpoint's tensors into sharded safetensors files, block by block."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from common.errors import CheckpointError, UsageError
from common.files.atomic import naming
from common.files.json_values import JsonValue
from merging.output.digests import Digest, block_bytes, digest_of
from merging.output.shards import Place, lay_out
from merging.output.staging.journal import Stage
from merging.plan.types import Named

if TYPE_CHECKING:
    from torch import Tensor

FLUSH = 1 << 28
"""Bytes after which what was written is sent to the disk, so that the end, where all must be there, need not wait."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@cache
def _beside(what: str) -> ThreadPoolExecutor:
    """A thread for what goes on beside the writing: "hash" of the block in hand, "flush" of what came before."""
    return ThreadPoolExecutor(1, thread_name_prefix=what)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_beside.cache_clear)  # a forked process has none of the threads


def parse_size(text: str) -> int:
    """Return bytes for "5GB", "200MB", "1GiB" or a plain number. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max_shard_size must be a size such as 5GB or 200MB, found {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


class ShardedWriter:
    """Writes tensors in the plan's order into safetensors files of at most `max_shard_bytes` each, block by block.

    Headers are written first, from the plan, so that each block's bytes go straight to the file and no tensor is ever
    held in memory. A finished tensor is entered in the journal with its digest; a writer over the
    journal of an interrupted run takes up after the last tensor whose bytes are there and have their digest.

    part: the part of the tensors that this process writes, where several write the files (see `Shards.allocate`); None
    for all of them.
    """

    def __init__(
        self,
        stage: Stage,
        tensors: Sequence[Named],
        max_shard_bytes: float,
        stem: str = "model",
        part: range | None = None,
    ) -> None:
        self.folder, self._stage = stage.folder, stage
        self.shards, self._shared = lay_out(tensors, max_shard_bytes, stem), part is not None
        self._places = self.shards.places if part is None else self.shards.places[part.start : part.stop]
        self._ends = list(accumulate((place.size for place in self._places), initial=0))
        self._stream: BinaryIO | None = None
        self._file = stage.folder
        self._shard = -1
        self._current: BinaryIO
        self._digest, self._written = Digest(), 0
        self._unsent, self._sending = 0, Future[None]()
        self._sending.set_result(None)
        self._next = self._verified()

    @property
    def done(self) -> int:
        """Number of tensors that are written."""
        return self._next

    @property
    def part(self) -> float:
        """Share of all the bytes that is written."""
        return (self._ends[self._next] + self._written) / max(1, self._ends[-1])

    def rewind(self, done: int) -> None:
        """Go on as if only the first `done` tensors were written."""
        self._next = min(self._next, done)
        self._stage.keep(self._next)

    def begin(self, name: str) -> None:
        """Start the next tensor of the plan. Raises CheckpointError where it is not the one that was planned."""
        place = self._places[self._next]
        if name != place.name:
            raise CheckpointError(f"Tensor {name} came where {place} was planned.")
        self._current = self._at(place)
        self._digest, self._written = Digest(), 0

    def add(self, block: Tensor) -> None:
        """Write the tensor's next rows. Raises CheckpointError where they are of another dtype than planned."""
        place = self._places[self._next]
        dtype = str(block.dtype).removeprefix("torch.")
        if dtype != place.dtype:
            raise CheckpointError(f"Tensor {place.name} {dtype} {list(block.shape)} came where {place} was planned.")
        data = block_bytes(block)
        hashed = _beside("hash").submit(self._digest.update, data)
        with naming(self._file):
            self._current.write(data)
        hashed.result()
        self._written += data.nbytes
        self._unsent += data.nbytes
        if self._unsent >= FLUSH and self._sending.done():
            self._send(self._current)

    def end(self, metadata: Mapping[str, JsonValue] = MappingProxyType({})) -> None:
        """Finish the tensor and enter it in the journal with metadata.

        Raises CheckpointError where it is not as large as planned.
        """
        place = self._places[self._next]
        if self._written != place.size:
            raise CheckpointError(f"Tensor {place.name} of {self._written} bytes came where {place} was planned.")
        with naming(self._file):
            self._current.flush()
        self._next, self._written = self._next + 1, 0
        self._stage.add({"name": place.name, "digest": self._digest.text(), **metadata})

    def close(self) -> None:
        """Finish the last shard and write the index (the first process does where several write).

        Raises CheckpointError where tensors are missing.
        """
        if self._next != len(self._places):
            raise CheckpointError(f"Tensor {self._places[self._next].name} was planned and never written.")
        self._let_go()
        self._sending.result()
        self._stage.close()
        if not self._shared:
            self.shards.write_index(self.folder)

    def abandon(self) -> None:
        """Close the files of a run that failed; errors of that are not reported beside the run's own."""
        with suppress(OSError):
            self._sending.result()
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
            self._stream = None
        self._stage.close()

    def _send(self, stream: BinaryIO) -> None:
        """Start to flush a file to the disk, also where it is closed meanwhile.

        Raises:
            OSError: the last flush failed.
        """
        self._sending.result()
        with naming(self._file):
            stream.flush()
            self._unsent, self._sending = 0, _beside("flush").submit(_sync, os.dup(stream.fileno()), self._file)

    def _verified(self) -> int:
        """Count the tensors that an interrupted run finished; what its journal has after them is dropped."""
        done = 0
        for shard in {place.shard for place, _ in zip(self._places, self._stage.entries, strict=False)}:
            _forget(self.folder / self.shards.names[shard])
        for entry, place in zip(self._stage.entries, self._places, strict=False):
            file = self.folder / self.shards.names[place.shard]
            if entry["name"] != place.name or digest_of(file, place.offset, place.size) != entry["digest"]:
                break
            done += 1
        self._stage.keep(done)
        self._repair(done)
        return done

    def _repair(self, done: int) -> None:
        """Give the files that are complete their header and size, which no digest covers."""
        if self._shared:  # all files get them at the end
            return
        following = {place.shard for place in self._places[done:]}
        for shard in {place.shard for place in self._places[:done]} - following:
            self.shards.complete(self.folder, shard)

    def _at(self, place: Place) -> BinaryIO:
        """The stream of the place's shard, at the place."""
        if self._stream is None or self._shard != place.shard:
            self._let_go()
            self._file = self.folder / self.shards.names[place.shard]
            with naming(self._file):
                self._stream = _shared(self._file) if self._shared else self._opened(self._file, place)
                self._shard = place.shard
                self._stream.seek(place.offset)
        return self._stream

    def _opened(self, file: Path, place: Place) -> BinaryIO:
        """The file as far as it was written, for what comes from the place on."""
        header = self.shards.header(place.shard)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        stream = os.fdopen(handle, "r+b")
        stream.write(header)
        stream.truncate(place.offset)
        return stream

    def _let_go(self) -> None:
        """Close the file; what others go on with on other machines is on the disk then, the rest on its way."""
        if self._stream is not None:
            self._send(self._stream)
            if self._shared:
                self._sending.result()
            self._stream.close()
            self._stream = None


def _sync(handle: int, file: Path) -> None:
    """Send a file to the disk and close it."""
    try:
        with naming(file):
            os.fsync(handle)
    finally:
        os.close(handle)


def _forget(file: Path) -> None:
    """Let the system forget what it holds of a file: what could not be written is then not taken for written."""
    if file.is_file() and hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _shared(file: Path) -> BinaryIO:
    """Open a file for writing alone: a network's file system then sends the bytes that were written and none beside."""
    return os.fdopen(os.open(file, os.O_WRONLY), "wb")
