"""DARE with task arithmetic. Yu et al. 2023, arXiv:2311.03099."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.dropping import drop_and_rescale, masks_of
from merging.methods.task_arithmetic import add_task_vectors
from merging.reference import task_arithmetic_reference
from merging.registry import merge_method


def dare_linear(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t (m_t * tau_t) / density_t, m_t ~ Bernoulli(density_t)

    base (rows, ...), finetuned (n, rows, ...), masks (n, rows, ...) -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_task_vectors(base, task_vectors, weights, scaling, normalize)


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
        base, finetuned, weights=weights, consensus=False, normalize=normalize, scaling=scaling
    )


METHOD = merge_method(reference=reference, prepare=masks_of)(dare_linear)
