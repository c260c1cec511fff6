"""Minimum detectable difference of two models on the same items. Standard library only."""

from __future__ import annotations

import math
from statistics import NormalDist

POWER = 0.8


def detectable_share(only_a: int, only_b: int, n: int, alpha: float, power: float = POWER) -> float | None:
    """Return the smallest difference of two proportions that McNemar's exact test finds with a given power.

    Connor 1987 (Biometrics 43, 207-211), with the continuity correction that stands for the exact test:

        n d = 1 + z(1 - alpha / 2) sqrt(n s) + z(power) sqrt(n (s - d^2)),   s >= d

    s is the share of items on which the models differ, as observed, and at least d. The result is never below the
    smallest difference that can be significant at all: k items that one model alone has right, 2 / 2^k < alpha.

    Args:
        only_a: Number of items that A alone has right.
        only_b: Number of items that B alone has right.
        n: Number of items that both answered, at least 1.
        alpha: Two-sided level of the test.
        power: Probability of finding the difference.

    Returns:
        The difference d as a fraction; None where not even a difference on all n items would be found.
    """
    at_alpha, at_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    observed = (only_a + only_b) / n
    least = math.floor(math.log2(2 / alpha)) + 1

    def shortfall(d: float) -> float:
        """Rises in d; 0 where the power is reached."""
        s = max(observed, d)
        return n * d - 1 - at_alpha * math.sqrt(n * s) - at_power * math.sqrt(n * (s - d * d))

    if least > n or shortfall(1.0) < 0:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if shortfall(middle) < 0 else (low, middle)
    return max(high, least / n)


def detectable_difference(standard_error: float, alpha: float, power: float = POWER) -> float | None:
    """Return the smallest difference that a two-sided test finds with a given power, by the normal approximation.

    (z(1 - alpha / 2) + z(power)) times the standard error of the difference, in its unit; None where that is 0, which
    says nothing about other items.
    """
    if not standard_error > 0:
        return None
    return (NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)) * standard_error
