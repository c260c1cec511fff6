"""Error sentence instead of SIGBUS where a memory-mapped input is truncated or cannot be read."""

from __future__ import annotations

from merging.ops.kernels.build import library


def report_bus_errors(note: str) -> None:
    """End this process with a sentence that names the file, and exit code 1, when a read from a mapped file fails.

    Args:
        note: text after the sentence. Without compiled kernels the signal keeps its default effect.
    """
    compiled = library()
    if compiled is not None:
        compiled.report_bus_errors(f" {note}".encode())
