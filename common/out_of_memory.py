"""What running out of memory looks like."""

from __future__ import annotations

SIGNS = ("outofmemoryerror", "out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on the CPU; torch has a RuntimeError for each."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)
