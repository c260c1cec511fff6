"""Confidence intervals of a table's numbers, and significance of the changes by AIM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import ProjectError
from eval.results.conditions import column_differences
from eval.results.rows import Models, Warn
from eval.stats.comparison import DRAWS, Difference, differences, right_or_wrong
from eval.stats.gains import HV, Gains, Measure, gain_draws
from eval.stats.resampling import LEAST_ITEMS, Terms, bootstrap, percentiles, seed_of
from eval.stats.significance import Interval, proportion_interval

GAIN_DRAWS = 2000
Place = tuple[str, str]
"""(key of a row, column), the column HV Gain included."""


@dataclass(frozen=True)
class Uncertainty:
    """Statistics of a table.

    Attributes:
        intervals: 95 % interval of each number.
        changes: 95 % interval of each difference to the merge without AIM: percentage points, or units of HV gain.
        significant: Places of the statistically significant differences.
        differences: All differences of a relaxed merge, by the row's key.
        compared: Number of relaxed merges that could be compared with their merge.
        pairs: Number of relaxed merges that have a merge in the table.
    """

    intervals: Mapping[Place, Interval] = field(default_factory=dict)
    changes: Mapping[Place, Interval] = field(default_factory=dict)
    significant: frozenset[Place] = frozenset()
    differences: Mapping[str, Sequence[Difference]] = field(default_factory=dict)
    compared: int = 0
    pairs: int = 0


def uncertainty(models: Models, gains: Gains, measure: Measure, warn: Warn, seed: int = 0) -> Uncertainty:
    """Compute intervals and significance from the outcomes per item, where there are any.

    Benchmarks: as `differences` does, corrected for their number within a row. HV gain: significant where the 95 %
    bootstrap interval of the difference of gains excludes 0, and the populations are the same.
    """
    intervals: dict[Place, Interval] = {}
    changes: dict[Place, Interval] = {}
    significant: set[Place] = set()
    gain_samples = gain_draws(models, gains, measure, GAIN_DRAWS, seed)
    intervals |= {(model, HV): percentiles(values) for model, values in gain_samples.items()}
    for row in models.rows:
        for column, outcomes in row.result.outcomes.items():
            if column in row.result.scores:
                terms = outcomes.terms(row.result.scores[column].metric)
                interval = score_interval(terms, column, seed)
                intervals |= {(row.key, column): interval} if interval else {}
    in_full: dict[str, Sequence[Difference]] = {}
    pairs = [(family.unrelaxed, row) for family in models.families if family.unrelaxed for row in family.rows[1:]]
    for unrelaxed, row in pairs:
        try:
            unlike = {c: column_differences(unrelaxed.result, row.result, c).keys() for c in models.columns}
            row_differences = differences(
                unrelaxed.result, row.result, DRAWS, seed, [c for c in unlike if unlike[c] <= {"items"}]
            )
            row_differences = [d for d in row_differences if not unlike[d.column]]
        except ProjectError as error:  # other data, or another metric: the scores do not compare
            warn(str(error))
            row_differences = []
        in_full |= {row.key: row_differences} if row_differences else {}
        changes |= {(row.key, d.column): d.interval for d in row_differences}
        significant |= {(row.key, d.column) for d in row_differences if d.is_significant}
        same = gains.populations.get(row.key) == gains.populations.get(unrelaxed.key)
        if same and row.key in gain_samples and unrelaxed.key in gain_samples:
            low, high = changes[row.key, HV] = percentiles(gain_samples[row.key] - gain_samples[unrelaxed.key])
            significant |= {(row.key, HV)} if low > 0 or high < 0 else set()
    return Uncertainty(intervals, changes, frozenset(significant), in_full, len(in_full), len(pairs))


def score_interval(terms: Terms, name: str, seed: int) -> Interval | None:
    """The 95 % interval of a score, in percent: Wilson's for a share of items, else the bootstrap's.

    None without items, and where a bootstrap has fewer than `LEAST_ITEMS`.
    """
    n = len(terms[0][0])
    if n == 0 or (n < LEAST_ITEMS and not right_or_wrong(terms)):
        return None
    if right_or_wrong(terms):
        low, high = proportion_interval(int(sum(terms[0][0])), len(terms[0][0]))
        return 100 * low, 100 * high
    return percentiles(bootstrap([terms], GAIN_DRAWS, seed_of(seed, name))[:, 0])
