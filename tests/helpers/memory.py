"""Watching the memory of a process from within: for code that a test runs in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
"""Linux's account of the process; where it is missing, such tests skip."""


def anonymous() -> float:
    """Return the anonymous memory that the process holds now, in MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def peak_of(work: Callable[[], object]) -> float:
    """Run `work` and return how far anonymous memory rose above what it was before, in MiB."""
    before = highest = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return highest - before
