"""Adding up sparse task vectors, plainly or by elected sign: the common last step of DARE, Breadcrumbs and DELLA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.consensus import disjoint_sum
from merging.dropping import drop_and_rescale
from merging.methods.task_arithmetic import add_task_vectors


def add_sparse(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t m_t tau_t f_t [ / sum_t w_t, if normalize ]

    base (rows, ...), finetuned (n, rows, ...), masks m (n, rows, ...) and factors f from the method -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_task_vectors(base, task_vectors, weights, scaling, normalize)


def add_agreeing(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum of the entries w_t m_t tau_t f_t that have the sign of their sum over t

    With normalize, divided by the sum of the weights of the entries added. Shapes as in `add_sparse`.
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return base + disjoint_sum(task_vectors, weights, normalize) * scaling
