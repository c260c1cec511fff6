"""A sentence instead of SIGBUS where a memory-mapped input is cut short or cannot be read."""

from __future__ import annotations

from merging.ops.kernels.build import library


def report_bus_errors(note: str) -> None:
    """Let this process end with a sentence that names the file, and exit code 1, at a read from a file that fails.

    Args:
        note: What is said after the sentence. Without compiled kernels the signal's default stays.
    """
    compiled = library()
    if compiled is not None:
        compiled.report_bus_errors(f" {note}".encode())
