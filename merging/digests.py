"""Digests (sha256) of files and of the tensors in them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22


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


def known_digest(file: Path) -> str | None:
    """Return the digest that the hub's cache names a large file by, or None for another file."""
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


class InputDigests:
    """Reads the inputs in a thread of its own while the merge runs; the two share what the system caches."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(dict.fromkeys(files))
        self._digests: dict[Path, str] = {}
        self._failure: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> InputDigests:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for file in self._files:
                digest = known_digest(file) or digest_of(file, stop=self._stop)
                if digest is not None:
                    self._digests[file] = digest
        except OSError as error:
            self._failure = error

    def all(self) -> dict[Path, str]:
        """Wait and return {file: digest}. Raises OSError where a file could not be read."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._digests
