"""Model Breadcrumbs with task arithmetic. Davari and Belilovsky 2023, arXiv:2312.06795."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.dropping import drop_and_rescale
from merging.methods.task_arithmetic import add_task_vectors
from merging.outliers import band_masks
from merging.registry import merge_method


def breadcrumbs(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t m_t * tau_t, m_t the band between outliers and small entries

    base (rows, ...), finetuned and masks (n, rows, ...) -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_task_vectors(base, task_vectors, weights, scaling, normalize)


METHOD = merge_method(prepare=band_masks)(breadcrumbs)
