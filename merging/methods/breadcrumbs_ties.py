"""Model Breadcrumbs with TIES's sign election. Davari and Belilovsky 2023, arXiv:2312.06795; arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.consensus import disjoint_sum
from merging.dropping import drop_and_rescale
from merging.outliers import band_masks
from merging.registry import merge_method


def breadcrumbs_ties(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """theta = theta_0 + lambda * sum of the entries w_t m_t tau_t that have the elected sign

    base (rows, ...), finetuned and masks (n, rows, ...) -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return base + disjoint_sum(task_vectors, weights, normalize) * scaling


METHOD = merge_method(prepare=band_masks)(breadcrumbs_ties)
