"""DELLA with task arithmetic. Deep et al. 2024, arXiv:2406.11617: drop small entries more often, add up the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.dropping import drop_and_rescale
from merging.magprune import magprune_masks
from merging.methods.task_arithmetic import add_task_vectors
from merging.registry import merge_method


def della_linear(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t m_t tau_t * factor_t

    base (rows, ...), finetuned and masks (n, rows, ...) -> (rows, ...); m_t from `magprune_masks`.
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_task_vectors(base, task_vectors, weights, scaling, normalize)


METHOD = merge_method(prepare=magprune_masks)(della_linear)
