"""Thread pool for blocks: compiled code releases the interpreter lock while it runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads() -> int:
    """Return the number of blocks in flight: torch's number of threads (OMP_NUM_THREADS)."""
    return torch.get_num_threads()


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="block")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], lookahead: int = 1, max_threads: int | None = None
) -> Generator[Result, None, None]:
    """Yield work(item) for each item, in order.

    An error of `work` is raised at its position. Then, and where the caller stops early, all started calls are awaited.

    Args:
        work: Function that runs in a thread of the pool.
        items: Its inputs.
        lookahead: Number of started and unconsumed calls beyond the number of threads.
        max_threads: Upper bound of the number of threads.
    """
    pool, started = _pool(threads()), deque[Future[Result]]()
    max_started = min(threads(), max_threads or threads()) + lookahead
    try:
        for item in items:
            started.append(pool.submit(work, item))
            if len(started) >= max_started:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        for future in started:
            future.cancel()
        for future in started:
            if not future.cancelled():
                future.exception()
