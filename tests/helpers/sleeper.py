"""Run of which one rank is killed while the others are busy for minutes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from common import distributed


def main(argv: Sequence[str]) -> int:
    """Sleep, or be killed."""
    distributed.GRACE_SECONDS = 0.5
    with distributed.init_distributed() as process_group:
        process_group.barrier()
        if process_group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return 0
