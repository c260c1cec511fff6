"""Root mean square input, a_j = sqrt(mean x_j^2): in the unit of the input, but more sensitive to rare large values."""

from __future__ import annotations

from torch import Tensor

from aim.statistics import Statistic
from aim.statistics.mean_square import sum_tokens


def finish(mean: Tensor) -> Tensor:
    """Return the square root of the mean square."""
    return mean.sqrt()


STATISTIC = Statistic(sum_tokens, finish)
