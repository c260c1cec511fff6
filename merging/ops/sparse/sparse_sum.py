"""Sums of sparse task vectors, plain or by elected sign: the common last step of DARE, Breadcrumbs and DELLA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from merging.ops.consensus import add_task_vectors, add_to, disjoint_sum, nonzero_total
from merging.ops.kernel_spec import RandomMask, WeightedSum


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
    """Return theta_0 + lambda * sum_t w_t m_t tau_t f_t [ / sum_t w_t, if normalize ].

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
    """Return theta_0 + lambda * sum of the entries w_t m_t tau_t f_t that have the sign of their sum over t.

    With normalize, divided by the sum of the weights of the entries added. Shapes as in `add_sparse`.
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_to(base, disjoint_sum(task_vectors, weights, normalize) * scaling)


def drop_and_rescale(task_vectors: Tensor, masks: Tensor, factors: Sequence[float | Tensor]) -> Tensor:
    """Return m_t * tau_t * f_t; task_vectors and masks (n, rows, ...) -> (n, rows, ...).

    A factor is a number, or a tensor (rows, ...) with one for each entry. With the factor 1/density the expectation
    over masks is the task vector itself (DARE, equation 2).
    """
    return torch.stack([tau * mask * factor for tau, mask, factor in zip(task_vectors, masks, factors, strict=True)])


def sparse_kernel_spec(
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Sequence[RandomMask | Tensor | None],
    factors: Sequence[float | Tensor],
    elect: bool = False,
) -> WeightedSum:
    """Describe `add_sparse` to the compiled kernel, or with `elect` `add_agreeing`."""
    total = nonzero_total(weights)
    return WeightedSum(weights, scaling, normalize, total, elect=elect, masks=masks, factors=factors)


agreeing_kernel_spec = partial(sparse_kernel_spec, elect=True)
"""Description of `add_agreeing` for the compiled kernel."""
