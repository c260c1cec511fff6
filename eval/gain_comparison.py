"""HV gains of two models over one population, and whether their difference is more than noise."""

from __future__ import annotations

from console.errors import UsageError
from eval.comparison_text import GainDifference
from eval.gains import Measure, all_gains, gain_draws
from eval.resampling import percentiles
from eval.rows import Models, Remark
from eval.uncertainty import GAIN_DRAWS


def compare_gains(models: Models, a: str, b: str, measure: Measure, seed: int, remark: Remark) -> GainDifference | None:
    """Compare the gains of models `a` and `b`; None where one has none, or no outcomes per item: `remark` hears why.

    Raises UsageError where their populations differ: such gains do not compare.
    """
    measure.check(models)
    gains = all_gains(models, measure, remark)
    if a not in gains.values or b not in gains.values:
        return None
    populations = [gains.populations[model] for model in (a, b)]
    if set(populations[0]) != set(populations[1]):
        sets = " and ".join(f"{{{', '.join(labels)}}}" for labels in populations)
        raise UsageError(
            f"The HV gains of A and B are over different populations ({sets}) and do not compare; give both one with "
            "--population FILE, or leave out --results."
        )
    drawn = gain_draws(models, gains, measure, GAIN_DRAWS, seed)
    if a not in drawn or b not in drawn:
        remark("HV gain: not every model of the population has outcomes on the same items, so it is not compared.")
        return None
    interval = percentiles(drawn[b] - drawn[a])
    return GainDifference(populations[0], gains.values[a], gains.values[b], interval)
