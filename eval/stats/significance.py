"""Exact McNemar test, score intervals and Holm's correction. Standard library only; CONTRIBUTING.md says why.

Two models answer the same items, so that what counts is the items on which they differ: `only_a` that only A has right,
`only_b` that only B has right, of `n` in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

LEVEL = 0.95
Interval = tuple[float, float]


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: a fair coin decides each item on which the models differ.

    The smaller tail of the binomial distribution, doubled, in exact integers, whose quotient is rounded once. 1 where
    they differ nowhere.
    """
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1
    for k in range(fewer):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << discordant))


def paired_interval(only_a: int, only_b: int, n: int, level: float = LEVEL) -> Interval:
    """Return the score interval of the difference B - A of two proportions on the same `n` items, as fractions.

    Tango 1998 (Statistics in Medicine 17, 891-908): the differences that a score test does not reject; at 0 that test
    is McNemar's, without continuity correction. It stays sensible where the models differ on few items or on none,
    where the usual interval has no width.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def statistic(difference: float) -> float:
        """Falls in `difference`; the variance is the one under it, `only_a`'s share estimated by maximum likelihood."""
        b = (2 * n - only_b + only_a) * difference - only_a - only_b
        c = -only_a * difference * (1 - difference)
        share = max(0.0, (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n))
        variance = n * (2 * share + difference * (1 - difference))
        distance = only_b - only_a - n * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    observed = (only_b - only_a) / n
    low = _crossing(lambda d: statistic(d) - z, -1.0, observed) if observed > -1 else -1.0
    high = _crossing(lambda d: statistic(d) + z, observed, 1.0) if observed < 1 else 1.0
    return low, high


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return the zero of a decreasing function by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def proportion_interval(right: int, n: int, level: float = LEVEL) -> Interval:
    """Return Wilson's score interval of a proportion, as fractions."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, extra = right / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method (1979), in the order given.

    Calling those below 0.05 significant makes one or more false calls with probability at most 0.05, whatever the
    dependence between the tests.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected
