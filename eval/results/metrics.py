"""Direction and scale of metrics: whether more is better, and whether a score is a fraction to print in percent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LOWER_IS_BETTER = frozenset(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score"))
"""lm-eval's registered metrics of which less is better; used for results that do not record a direction."""
NOT_FRACTIONS = LOWER_IS_BETTER | {"bleu", "chrf", "chrf++", "mcc", "likelihood", "likelihood_diff", "bypass"}
"""lm-eval's registered metrics that are not shares of anything: unbounded, signed, or on a scale of 100 already."""
FRACTIONS = frozenset(
    (
        *("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "accuracy", "exact_match", "em", "f1"),
        *("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc"),
        *("math_verify", "pass_at_1", "rouge1", "rouge2", "rougeL", "precision", "recall"),
        *("strict match", "flexible match", "mean of 4 accuracies", "published"),
    )
)
_MEANS = frozenset(("mean", "nanmean"))
_NOT_MEANS = frozenset(
    (
        *("perplexity", "weighted_perplexity", "bits_per_byte", "bleu", "chrf", "chrfpp", "ter", "brier_score"),
        *("matthews_corrcoef", "bypass_agg"),
    )
)
_RATE = re.compile(r"(?:pass|avg)@\d+.*")


def direction_of(metric: str, directions: Mapping[str, object] | None = None) -> bool | None:
    """Return whether a higher value of `metric` is better; None where the task's directions disagree.

    Args:
        metric: lm-eval's name of the metric, without its filter.
        directions: lm-eval's "higher_is_better" of the task or group, by metric. A metric it does not list follows
            lm-eval's registry of metrics, and is otherwise taken as one of which more is better, as lm-eval does.
    """
    if directions is not None and metric in directions:
        value = directions[metric]
        return None if value is None else bool(value)
    return metric not in LOWER_IS_BETTER


def is_fraction(metric: str, aggregation: str = "mean", values: Iterable[object] = ()) -> bool:
    """Return whether a score of `metric` is a fraction between 0 and 1, which is printed in percent.

    The metric decides, never a part of its name: first the aggregation, then the list of known metrics. A metric that
    is not known is a fraction where it is the mean of at least one value and every value is between 0 and 1.

    Args:
        metric: lm-eval's name of the metric, without its filter.
        aggregation: The name of lm-eval's function that aggregates it over items.
        values: Its value for each item.
    """
    if metric in NOT_FRACTIONS or aggregation in _NOT_MEANS:
        return False
    if metric in FRACTIONS or _RATE.fullmatch(metric):
        return True
    values = list(values)
    return aggregation in _MEANS and bool(values) and all(isinstance(v, int | float) and 0 <= v <= 1 for v in values)
