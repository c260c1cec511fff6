"""Digests of files and of the tensors in them: BLAKE3, each with its name before it."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from common.files.bounded_reading import UnreadableError, open_regular
from common.files.file_state import FileState, check_unchanged, states_of
from common.hardware import usable_cores
from merging.checkpoints.storage import map_file

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22
PIECE = 1 << 24
"""Bytes of an input at a time: after each the thread waits for the interpreter, which an import holds for long."""
LEAD = 4 << 30
"""Bytes of the inputs that their digests may be ahead of the merge."""
LANE_CORES = 8
"""Of so many cores one takes the inputs' digests: a core does 4 to 5 GB/s, and more of them are wanted by the merge."""


def lane_threads(cores: int) -> int:
    """Return how many of a machine's cores take the inputs' digests."""
    return max(1, cores // LANE_CORES)


class Digest:
    """The digest of bytes that come piece by piece, as "blake3:..."."""

    def __init__(self, threads: int = 1) -> None:
        from blake3 import blake3  # here: GPU tests and benchmarks run where it is not installed

        self._state = blake3(max_threads=threads)

    def update(self, data: memoryview | bytes) -> None:
        """Take the next bytes; the interpreter is free meanwhile."""
        self._state.update(data)

    def text(self) -> str:
        """The digest of what was taken so far."""
        return f"blake3:{self._state.hexdigest()}"


def digest_of(file: Path, offset: int = 0, size: int | None = None, stop: threading.Event | None = None) -> str | None:
    """Return the digest of `size` bytes of a file from `offset` (None: to its end).

    None where the file is shorter, does not exist or is no regular file, or where `stop` was set meanwhile.
    """
    digest, remaining = Digest(), size
    try:
        with open_regular(file) as stream:
            stream.seek(offset)
            while (remaining is None or remaining > 0) and not (stop and stop.is_set()):
                chunk = stream.read(CHUNK if remaining is None else min(CHUNK, remaining))
                if not chunk:
                    break
                digest.update(chunk)
                remaining = None if remaining is None else remaining - len(chunk)
    except (FileNotFoundError, UnreadableError):
        return None
    return None if remaining or (stop and stop.is_set()) else digest.text()


def block_bytes(block: Tensor) -> memoryview:
    """Return the bytes of a block of a tensor on the CPU, as a file holds them."""
    import torch

    return block.detach().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_digest(blocks: Iterable[Tensor]) -> str:
    """Return the digest of the bytes of a tensor that comes in blocks of rows."""
    digest = Digest()
    for block in blocks:
        digest.update(block_bytes(block))
    return digest.text()


class InputDigests:
    """Reads the inputs in a thread of its own while the merge runs; the two share what the system caches.

    inputs: the files of each. The inputs advance together, each file after file, as the merge does, and by at most LEAD
    bytes ahead of it: `progress` tells which part of its work is done. What is larger than the cache is then read from
    the disk once and not twice.
    """

    def __init__(self, inputs: Iterable[Iterable[Path]], progress: Callable[[], float] = lambda: 1.0) -> None:
        listed: set[Path] = set()
        self._inputs = [[f for f in files if f not in listed and not listed.add(f)] for files in inputs]  # type: ignore[func-returns-value]
        self._progress = progress
        self._digests: dict[Path, str] = {}
        self._failure: Exception | None = None
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
        """Wait and return {file: digest}. Raises OSError or CheckpointError where a file could not be read."""
        self._hurry.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._digests

    def _work(self) -> None:
        try:
            lanes = [_InputReader([file for file in files if not self._small(file)]) for files in self._inputs]
            self._together([lane for lane in lanes if lane.size])
        except Exception as error:
            self._failure = error

    def _small(self, file: Path) -> bool:
        """Take the digest of a file that one read suffices for, or that is not there; returns whether it was one."""
        if file.is_file() and file.stat().st_size > CHUNK:
            return False
        digest = digest_of(file, stop=self._stop)
        if digest is not None:
            self._digests[file] = digest
        return True

    def _together(self, lanes: list[_InputReader]) -> None:
        total = sum(lane.size for lane in lanes)
        with ExitStack() as stack:
            for lane in lanes:
                stack.callback(lane.close)
            while lanes and not self._stop.is_set():
                lead = sum(lane.taken for lane in lanes) - self._progress() * total
                if lead > LEAD and not self._hurry.wait(0.01):
                    continue
                least = min(lanes, key=lambda lane: lane.taken / lane.size)
                self._digests.update(least.advance(PIECE))
                lanes = [lane for lane in lanes if lane.files]


class _InputReader:
    """The large files of one input, one after the other, through memory maps."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.size = sum(file.stat().st_size for file in files)
        self.taken = 0
        self._threads = lane_threads(usable_cores())
        self._map: mmap.mmap | None = None
        self._states: dict[Path, FileState] = {}
        self._place, self._digest = 0, Digest()

    def advance(self, size: int) -> dict[Path, str]:
        """Take the next bytes of the first file that is not finished; returns its digest where it is now."""
        if self._map is None:
            self._states = states_of(self.files[:1])
            self._map = map_file(self.files[0])
            self._place, self._digest = 0, Digest(self._threads)
        check_unchanged(self._states)  # a mapped file that is cut short ends the process
        with memoryview(self._map) as view, view[self._place : self._place + size] as piece:
            self._digest.update(piece)
            self._place += len(piece)
            self.taken += len(piece)
        if self._place < len(self._map):
            return {}
        self.close()
        return {self.files.pop(0): self._digest.text()}

    def close(self) -> None:
        """Let go of the file."""
        if self._map is not None:
            self._map.close()
            self._map = None
