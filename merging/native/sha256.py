"""SHA-256 of two byte streams at once, by the compiled kernel; the digests are hashlib's."""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, c_int64, c_uint32, c_void_p
from functools import cache
from typing import Any

from merging.native.build import library

BLOCK = 64
FIRST_STATE = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip


@cache
def _kernel() -> Any:
    compiled = library()
    kernel = getattr(compiled, "sha256_blocks", None) if compiled is not None else None
    if kernel is not None:
        kernel.argtypes, kernel.restype = (POINTER(c_uint32 * 8), POINTER(c_void_p), c_int64, c_int64), None
    return kernel


def available() -> bool:
    """Return whether the kernel is there: compiled, on a processor with these instructions."""
    return _kernel() is not None


class Stream:
    """A byte stream in memory, from `address`, taken block by block of 64 bytes."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size, self.taken = address, size, 0
        self.state = (c_uint32 * 8)(*FIRST_STATE)

    @property
    def left(self) -> int:
        """Bytes in whole blocks that are not taken yet."""
        return (self.size - self.taken) // BLOCK * BLOCK

    def hexdigest(self) -> str:
        """Take what is left, less than a block, with the padding, and return the digest."""
        tail = ctypes.string_at(self.address + self.taken, self.size - self.taken) if self.size > self.taken else b""
        padded = tail + b"\x80" + bytes(-(len(tail) + 9) % BLOCK) + struct.pack(">Q", 8 * self.size)
        held = ctypes.create_string_buffer(padded, len(padded))
        last = Stream(ctypes.addressof(held), len(padded))
        last.state = self.state
        take([last], len(padded))
        return b"".join(struct.pack(">I", word) for word in last.state).hex()


def take(streams: list[Stream], size: int) -> None:
    """Take `size` bytes, whole blocks, from each of one or two streams."""
    kernel = _kernel()
    assert kernel is not None
    states = (c_uint32 * 8 * len(streams))(*(stream.state for stream in streams))
    data = (c_void_p * len(streams))(*(stream.address + stream.taken for stream in streams))
    kernel(states, data, size // BLOCK, len(streams))
    for stream, state in zip(streams, states, strict=True):
        stream.state = type(stream.state)(*state)
        stream.taken += size
