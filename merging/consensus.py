"""Combining the task vectors of several models: weighted sum, elected sign, disjoint mean.

Sums run over the models one after the other, a product and then an addition each, so that every element is computed
alike wherever it lies in a block and on whatever device (a fused multiply-add would round differently).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    """Return sum_t w_t x_t; tensors (n, ...), weights n floats -> (...)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def nonzero_total(weights: Sequence[float]) -> float:
    """Return sum_t w_t, or 1 where it vanishes, so that normalising by it never divides by zero."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def disjoint_sum(task_vectors: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Elect a sign per entry and add up (or average) the weighted entries that have it.

        gamma = sgn(sum_t w_t tau_t), + where the sum is zero
        result = sum_{sgn(w_t tau_t) = gamma} w_t tau_t  [ / sum of those w_t, if normalize ]

    task_vectors (n, ...), weights n floats -> (...). TIES, Yadav et al. 2023, Algorithm 1, steps 2 and 3.
    """
    weighted = [tensor * weight for tensor, weight in zip(task_vectors, weights, strict=True)]
    elected = weighted[0].clone()
    for tensor in weighted[1:]:
        elected += tensor
    positive = elected >= 0
    total = torch.zeros_like(elected)
    kept_weight = torch.zeros_like(elected)
    for tensor, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        total += tensor * agrees
        if normalize:
            kept_weight += agrees * weight
    if normalize:
        total /= torch.where(kept_weight == 0, torch.ones_like(kept_weight), kept_weight)
    return total
