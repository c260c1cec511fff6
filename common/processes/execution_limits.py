"""Limits for foreign programs that run in this process: chat templates, and models built from foreign configs."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from common.files.bounded_reading import LimitError

TEMPLATE_SECONDS = 5.0
"""Time of a chat template for one chat; real ones take milliseconds."""
TEMPLATE_MEMORY = 256 << 20
"""Bytes that a chat template may take for one chat."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise LimitError with `message` in the block once it has run for `seconds`.

    Only the main thread of a system with interval timers can be interrupted; elsewhere the block runs without a limit.
    A surrounding limit is kept.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise LimitError(message)

    before = signal.signal(signal.SIGALRM, expire)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let allocations in the block fail with MemoryError beyond `size` bytes more than are in use; on Linux alone."""
    status = Path("/proc/self/status")
    used = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if used is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(used[1]) * 1024 + size
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
