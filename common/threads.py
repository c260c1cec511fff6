"""Several blocks at a time: threads that wait for compiled code, which lets go of the interpreter while it runs."""

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
    """Return how many blocks are worked on at a time: as many as torch has threads (OMP_NUM_THREADS)."""
    return torch.get_num_threads()


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="block")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1, most: int | None = None
) -> Generator[Result, None, None]:
    """Yield work(item) for each item, in order, at most `threads() + ahead` of them begun and not yet taken.

    most: stands in for `threads()` where it is less.

    An error of `work` is raised where its result is due; then, as where the caller stops early, what has begun is
    waited for, so that nothing works on behind the caller's back.
    """
    pool, begun = _pool(threads()), deque[Future[Result]]()
    begins = min(threads(), most or threads()) + ahead
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) >= begins:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        for future in begun:
            if not future.cancelled():
                future.exception()
