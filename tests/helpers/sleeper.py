"""A run of which one process is killed while the others are busy for minutes; for the test of how they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from merging import company
from merging.processes import together


def main(argv: Sequence[str]) -> int:
    """Sleep, or be killed."""
    company.GRACE = 0.5
    with together() as processes:
        processes.wait()
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return 0
