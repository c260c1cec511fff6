"""Bootstrap over items and permutation of models, for scores that are means of ratios. Needs numpy.

A score is 100 times the mean over its terms of sum(numerators) / sum(denominators), as `Outcomes.terms` gives them: one
term with denominators 1 for an accuracy, four for IFEval. Items that look alike are drawn together: what counts is how
often each pattern of verdicts was drawn, a multinomial, so that 10,000 draws of 14,042 items take a moment.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.stats.significance import LEVEL, Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Terms = Sequence[tuple[Sequence[float], Sequence[float]]]
LEAST_ITEMS = 10
"""Fewer items give no bootstrap interval: draws of them are too much alike, those of one item all the same."""
CELLS = 1 << 22
"""Draws are made in blocks of so many counts, 32 MiB."""


def seed_of(seed: int, name: str) -> list[int]:
    """A seed for one benchmark, so that it does not matter which others are compared, or in which order."""
    return [seed, zlib.crc32(name.encode())]


def bootstrap(models: Sequence[Terms], draws: int, seed: Sequence[int]) -> Array:
    """Return (draws, models) scores in percent on items drawn with replacement, the same items for every model."""
    import numpy as np

    patterns, counts = _patterns(models)
    generator = np.random.default_rng(seed)
    total, block = int(counts.sum()), max(1, CELLS // len(counts))
    sums = [
        generator.multinomial(total, counts / total, size=min(block, draws - start)) @ patterns
        for start in range(0, draws, block)
    ]
    return _scores(np.concatenate(sums), [len(terms) for terms in models])


def permutation(a: Terms, b: Terms, draws: int, seed: Sequence[int]) -> float:
    """Return the two-sided p-value of the difference of two models' scores, by exchanging their answers item by item.

    If it makes no difference which model answered, every item's two outcomes could as well be the other way round. The
    observed arrangement counts as one of the draws, so that p is never 0.
    """
    import numpy as np

    patterns, counts = _patterns([a, b])
    half = patterns.shape[1] // 2
    first, second = patterns[:, :half], patterns[:, half:]
    generator = np.random.default_rng(seed)
    block = max(1, CELLS // len(counts))
    observed = abs(float(_difference(counts[None] @ first, counts[None] @ second)[0]))
    extreme = 0
    for start in range(0, draws, block):
        swapped = generator.binomial(counts, 0.5, size=(min(block, draws - start), len(counts)))
        unswapped = counts - swapped
        differences = _difference(unswapped @ first + swapped @ second, unswapped @ second + swapped @ first)
        extreme += int((np.abs(differences) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + draws)


def percentiles(values: Array, level: float = LEVEL) -> Interval:
    """Return the percentile interval of bootstrap draws."""
    import numpy as np

    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _patterns(models: Sequence[Terms]) -> tuple[Array, NDArray[np.intp]]:
    """Distinct rows of (numerator, denominator) columns of all models' terms, and how many items have each."""
    import numpy as np

    columns = [values for terms in models for term in terms for values in term]
    table = np.array(columns, dtype=np.float64).T
    patterns, counts = np.unique(table, axis=0, return_counts=True)
    return patterns, counts


def _scores(sums: Array, sizes: Sequence[int]) -> Array:
    """(draws, columns) sums to (draws, models) scores; model i has sizes[i] terms of two columns each."""
    import numpy as np

    numerators, denominators = sums[:, 0::2], sums[:, 1::2]
    is_valid = denominators > 0  # a draw may lack all items of a small task; the mean is then over the other tasks
    ratios = np.divide(numerators, denominators, out=np.zeros_like(numerators, dtype=np.float64), where=is_valid)
    ends = np.cumsum(sizes)
    terms = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return np.stack([100 * ratios[:, t].sum(axis=1) / is_valid[:, t].sum(axis=1) for t in terms], 1)


def _difference(a: Array, b: Array) -> Array:
    terms = a.shape[1] // 2
    return _scores(b, [terms])[:, 0] - _scores(a, [terms])[:, 0]
