"""Messages of the programs: one logger with one handler on stderr, and the switch of progress bars."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.terminal_text import terminal_lines

logger = logging.getLogger("activation_informed_merging")
"""Logger of all messages: `info` for what --quiet hides, `warning` for what it does not."""


class StderrHandler(logging.Handler):
    """Handler that prints plain messages on the present sys.stderr, without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message; stdout is for results."""
        print(terminal_lines(record.getMessage()), file=sys.stderr, flush=True)


@contextmanager
def message_level(quiet: bool) -> Iterator[None]:
    """Set the level for the duration of a run: warnings only where `quiet`, and on ranks other than 0."""
    level = logger.level
    is_main = os.environ.get("RANK", "0") in ("", "0")
    logger.setLevel(logging.WARNING if quiet or not is_main else logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)


def hides_progress() -> bool | None:
    """Return tqdm's `disable`: True where messages are hidden, None (bars on terminals only) elsewhere."""
    return None if logger.isEnabledFor(logging.INFO) else True


logger.addHandler(StderrHandler())
logger.setLevel(logging.INFO)
logger.propagate = False
