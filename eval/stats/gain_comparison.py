"""HV gains of two models over one population, with a bootstrap interval of their difference."""

from __future__ import annotations

from dataclasses import dataclass

from eval.results.rows import Models, Warn
from eval.stats.gains import Measure, all_gains, gain_draws
from eval.stats.resampling import LEAST_ITEMS, percentiles
from eval.stats.significance import Interval
from eval.stats.uncertainty import GAIN_DRAWS


@dataclass(frozen=True)
class GainDifference:
    """HV gains of A and B over one population, and the 95 % bootstrap interval of B - A."""

    population: tuple[str, ...]
    a: float
    b: float
    interval: Interval

    @property
    def is_significant(self) -> bool:
        """True where the difference is statistically significant."""
        return self.interval[0] > 0 or self.interval[1] < 0


def compare_gains(models: Models, a: str, b: str, measure: Measure, seed: int, warn: Warn) -> GainDifference | None:
    """Compare the gains of models `a` and `b`; None where that cannot be, and `warn` receives the reason.

    It cannot where one has no gain or no outcomes per item, or where their populations differ.
    """
    measure.check(models)
    gains = all_gains(models, measure, lambda sentence: None)
    without = [name for name, model in (("A", a), ("B", b)) if model not in gains.values]
    if without:
        warn(
            f"HV gain: {' and '.join(without)} {'have' if len(without) > 1 else 'has'} none; it takes a merge, and "
            "results of its population on every benchmark."
        )
        return None
    populations = [gains.populations[model] for model in (a, b)]
    if set(populations[0]) != set(populations[1]):
        sets = " and ".join(f"{{{', '.join(labels)}}}" for labels in populations)
        warn(
            f"HV gain: those of A and B are over different populations ({sets}) and do not compare; --population FILE "
            "gives both one."
        )
        return None
    draws_of_gains = gain_draws(models, gains, measure, GAIN_DRAWS, seed)
    if a not in draws_of_gains or b not in draws_of_gains:
        warn(
            f"HV gain: not every model of the population has outcomes on the same items, {LEAST_ITEMS} or more of each "
            "benchmark, so it is not compared."
        )
        return None
    interval = percentiles(draws_of_gains[b] - draws_of_gains[a])
    return GainDifference(populations[0], gains.values[a], gains.values[b], interval)
