"""Mean squared input, a_j = mean x_j^2: the diagonal of the input's second moment, which weighs large inputs more."""

from __future__ import annotations

from torch import Tensor

from aim.statistics import Statistic


def sum_tokens(x: Tensor, dim: int) -> Tensor:
    """Return the sum of x^2 along `dim`, fp32 over the entries, as fp64 on x's device."""
    return x.detach().float().square().sum(dim).double()


def finish(mean: Tensor) -> Tensor:
    """Return the mean as it is."""
    return mean


STATISTIC = Statistic(sum_tokens, finish)
