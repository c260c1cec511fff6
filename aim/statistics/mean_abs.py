"""Mean absolute input, a_j = mean |x_j|: the paper's statistic (arXiv:2502.02421), as in AWQ (arXiv:2306.00978)."""

from __future__ import annotations

import torch
from torch import Tensor

from aim.statistics import Statistic


def sum_tokens(x: Tensor, dim: int) -> Tensor:
    """Return the sum of |x| along `dim`, fp32 over the entries, as fp64 on x's device."""
    if x.device.type == "cuda":  # one reading of x in place of a copy of its magnitudes; the sum in another order
        result: Tensor = torch.linalg.vector_norm(x.detach(), ord=1, dim=dim, dtype=torch.float32).double()
        return result
    return x.detach().abs().sum(dim, dtype=torch.float32).double()


def finish(mean: Tensor) -> Tensor:
    """Return the mean as it is."""
    return mean


STATISTIC = Statistic(sum_tokens, finish)
