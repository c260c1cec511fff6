"""Beginnings that many inputs share: found once, computed once, where that saves enough."""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 64
LEAST_SHARE = 0.25


def shared(inputs: Sequence[tuple[int, ...]] | Sequence[list[int]]) -> int:
    """How many ids all of `inputs` begin with; the first and last in order bound it for all."""
    first, last = min(inputs), max(inputs)  # type: ignore[type-var]
    length = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        length += 1
    return length


def worth_it(length: int, lengths: Sequence[int]) -> bool:
    """Whether computing a beginning of `length` ids once pays: measured by scripts/bench_eval.py.

    Attention over a cache is slower than over the input itself, and batches no longer mix groups.
    """
    saved = length * (len(lengths) - 1)
    return length >= LEAST and len(lengths) > 2 and saved >= LEAST_SHARE * sum(lengths)
