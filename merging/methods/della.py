"""DELLA. Deep et al. 2024, arXiv:2406.11617: drop small entries more often, elect a sign, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.consensus import disjoint_sum
from merging.dropping import drop_and_rescale
from merging.magprune import magprune_masks
from merging.registry import merge_method


def della(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t m_t tau_t * factor_t, over the entries of the elected sign

    base (rows, ...), finetuned and masks (n, rows, ...) -> (rows, ...); m_t from `magprune_masks`.
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return base + disjoint_sum(task_vectors, weights, normalize) * scaling


METHOD = merge_method(prepare=magprune_masks)(della)
