"""merge.py with a pause before each tensor that it writes, so that a test meets it in its middle."""

from __future__ import annotations

import time
from collections.abc import Sequence

import merge
from merging.output.writer import ShardedWriter

PAUSE = 0.02
"""Seconds."""


def main(argv: Sequence[str]) -> int:
    """Merge slowly."""
    begin = ShardedWriter.begin

    def begin_later(writer: ShardedWriter, name: str) -> None:
        time.sleep(PAUSE)
        begin(writer, name)

    ShardedWriter.begin = begin_later  # type: ignore[method-assign]
    return merge.main(argv)
