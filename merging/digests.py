"""Digests (sha256) of files and of the tensors in them."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from console.files import known_digest
from merging.native import sha256
from merging.stored import map_file

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22
LEAD = 4 << 30
"""Bytes of the inputs that their digests may be ahead of the merge."""


def digest_of(file: Path, offset: int = 0, size: int | None = None, stop: threading.Event | None = None) -> str | None:
    """Return the sha256 of `size` bytes of a file from `offset` (None: to its end).

    None where the file is shorter or does not exist, or where `stop` was set meanwhile.
    """
    digest, left = hashlib.sha256(), size
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            while (left is None or left > 0) and not (stop and stop.is_set()):
                chunk = stream.read(CHUNK if left is None else min(CHUNK, left))
                if not chunk:
                    break
                digest.update(chunk)
                left = None if left is None else left - len(chunk)
    except FileNotFoundError:
        return None
    return None if left or (stop and stop.is_set()) else digest.hexdigest()


def block_bytes(block: Tensor) -> memoryview:
    """Return the bytes of a block of a tensor on the CPU, as a file holds them."""
    import torch

    return block.detach().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_digest(blocks: Iterable[Tensor]) -> str:
    """Return the sha256 of the bytes of a tensor that comes in blocks of rows."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block_bytes(block))
    return digest.hexdigest()


class InputDigests:
    """Reads the inputs in a thread of its own while the merge runs; the two share what the system caches.

    inputs: the files of each. The inputs advance together, each file after file, two at a time, as the merge does, and
    by at most LEAD bytes ahead of it: `progress` tells which part of its work is done. What is larger than the cache is
    then read from the disk once and not twice.
    """

    def __init__(self, inputs: Iterable[Iterable[Path]], progress: Callable[[], float] = lambda: 1.0) -> None:
        seen: set[Path] = set()
        self._inputs = [[f for f in files if f not in seen and not seen.add(f)] for files in inputs]  # type: ignore[func-returns-value]
        self._progress = progress
        self._digests: dict[Path, str] = {}
        self._failure: OSError | None = None
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> InputDigests:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def all(self) -> dict[Path, str]:
        """Wait and return {file: digest}. Raises OSError where a file could not be read."""
        self._hurry.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._digests

    def _work(self) -> None:
        try:
            lanes = [_Lane([file for file in files if not self._small(file)]) for files in self._inputs]
            self._together([lane for lane in lanes if lane.size])
        except OSError as error:
            self._failure = error

    def _small(self, file: Path) -> bool:
        """Take the digest of a file that need not be paired with another; returns whether it was one."""
        digest = known_digest(file)
        if digest is None and sha256.available() and file.is_file() and file.stat().st_size >= CHUNK:
            return False
        digest = digest or digest_of(file, stop=self._stop)
        if digest is not None:
            self._digests[file] = digest
        return True

    def _together(self, lanes: list[_Lane]) -> None:
        total = sum(lane.size for lane in lanes)
        with ExitStack() as stack:
            for lane in lanes:
                stack.callback(lane.close)
            while lanes and not self._stop.is_set():
                ahead = sum(lane.taken for lane in lanes) - self._progress() * total
                if ahead > LEAD and not self._hurry.wait(0.01):
                    continue
                least = sorted(lanes, key=lambda lane: lane.taken / lane.size)[:2]
                streams = [lane.stream() for lane in least]
                size = min(CHUNK, *(stream.left for stream in streams))
                sha256.take(streams, size)
                for lane in least:
                    self._digests.update(lane.advance(size))
                lanes = [lane for lane in lanes if lane.files]


class _Lane:
    """The large files of one input, one after the other, through memory maps."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.size = sum(file.stat().st_size for file in files)
        self.taken = 0
        self._map: mmap.mmap | None = None
        self._view: Any = None
        self._stream: sha256.Stream | None = None

    def stream(self) -> sha256.Stream:
        """The bytes of the first file that is not finished."""
        if self._stream is None:
            import numpy

            self._map = map_file(self.files[0])
            # numpy alone tells where bytes are that may not be written to; a map that may be is refused above some size
            self._view = numpy.frombuffer(self._map, numpy.uint8)
            self._stream = sha256.Stream(self._view.ctypes.data, len(self._map))
        return self._stream

    def advance(self, size: int) -> dict[Path, str]:
        """Account for bytes that were taken; returns the digest of a file that is finished."""
        self.taken += size
        stream = self.stream()
        if stream.left:
            return {}
        found = {self.files.pop(0): stream.hexdigest()}
        self.close()
        return found

    def close(self) -> None:
        """Let go of the file."""
        self._stream = self._view = None
        if self._map is not None:
            self._map.close()
            self._map = None
