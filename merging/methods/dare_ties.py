"""DARE with TIES's sign election. Yu et al. 2023, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.consensus import disjoint_sum
from merging.dropping import drop_and_rescale, masks_of
from merging.reference import task_arithmetic_reference
from merging.registry import merge_method


def dare_ties(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """Drop and rescale each task vector, elect a sign per entry, add up the entries that agree.

        tau_t = m_t * (theta_t - theta_0) / density_t,  m_t ~ Bernoulli(density_t)
        theta = theta_0 + lambda * sum_{sgn(w_t tau_t) = sgn(sum_s w_s tau_s)} w_t tau_t

    base (rows, ...), finetuned (n, rows, ...), masks (n, rows, ...) -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return base + disjoint_sum(task_vectors, weights, normalize) * scaling


def reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    weights: Sequence[float],
    density: Sequence[float],
    rescale: str,
    scaling: float,
    normalize: bool,
) -> Tensor:
    """The original's arithmetic on whole bf16 tensors, at density 1, where nothing is dropped."""
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


METHOD = merge_method(reference=reference, prepare=masks_of)(dare_ties)
