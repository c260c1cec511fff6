"""Combination of the task vectors of several models: weighted sum, elected sign, disjoint mean, majority sign.

Sums run over the models one after the other, a product and then an addition each, so that every element is computed
alike at every place of a block and on every device (a fused multiply-add would round differently).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from merging.ops.order_statistics import Threshold
from merging.ops.sparse.sparsify import trim
from merging.ops.tensor_blocks import Block, TensorGroup


def weighted_sum(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    """Return sum_t w_t x_t; tensors (n, ...), weights n floats -> (...)."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def add_to(anchor: Tensor, step: Tensor) -> Tensor:
    """Return anchor + step, the anchor's own bits where the step is zero: -0.0 + 0.0 would lose its sign."""
    return torch.where(step == 0, anchor, anchor + step)


def add_task_vectors(
    base: Tensor, task_vectors: Tensor, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """Return theta_0 + lambda * sum_t w_t tau_t [ / sum_t w_t, if normalize ].

    base (rows, ...), task_vectors (n, rows, ...) -> (rows, ...).
    """
    merged = weighted_sum(task_vectors, weights)
    if normalize:
        merged = divided(merged, nonzero_total(weights))
    return add_to(base, merged * scaling)


def nonzero_total(weights: Sequence[float]) -> float:
    """Return sum_t w_t, or 1 where it vanishes, so that normalising by it never divides by zero."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def divided(x: Tensor, by: float) -> Tensor:
    """Return x / by, the same bits on every device; x of any shape and float dtype.

    A GPU multiplies by the reciprocal of a number, which may differ in the last bit; by a tensor it divides.
    """
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def disjoint_sum(task_vectors: Tensor, weights: Sequence[float], normalize: bool, zero_sign: int = 1) -> Tensor:
    """Elect a sign per entry and return the sum (or mean) of the weighted entries that have it.

        gamma = sgn(sum_t w_t tau_t), `zero_sign` where the sum is zero
        result = sum_{sgn(w_t tau_t) = gamma} w_t tau_t  [ / sum of those w_t, if normalize ]

    task_vectors (n, ...), weights n floats, zero_sign 1, -1 or 0 (then nothing has it) -> (...). TIES, Yadav et al.
    2023, Algorithm 1, steps 2 and 3.
    """
    elected = weighted_sum(task_vectors, weights)
    positive, negative = elected > 0, elected < 0
    if zero_sign > 0:
        positive = ~negative
    elif zero_sign < 0:
        negative = ~positive
    total = torch.zeros_like(elected)
    weight_added = torch.zeros_like(elected)
    for tensor, weight in zip(task_vectors, weights, strict=True):
        weighted = tensor * weight
        agrees = ((weighted > 0) & positive) | ((weighted < 0) & negative)
        total += weighted * agrees
        if normalize:
            weight_added += agrees * weight
    if normalize:
        total /= torch.where(weight_added == 0, torch.ones_like(weight_added), weight_added)
    return total


def trimmed(task_vectors: Tensor, thresholds: Sequence[Threshold | None], block: Block) -> Tensor:
    """Trim the rows of each task vector, (n, rows, ...) -> the same shape."""
    return torch.stack([trim(tau, limit, block) for tau, limit in zip(task_vectors, thresholds, strict=True)])


def majority_sign(tensors: Iterable[tuple[TensorGroup, Sequence[Threshold | None]]], weights: Sequence[float]) -> int:
    """Return sgn of the sum over all entries of sgn(sum_t w_t tau_t), the task vectors being trimmed: 1, 0 or -1.

    tensors: those that the sum is taken over, each with its thresholds.
    """
    balance = 0
    for group, thresholds in tensors:
        for block in group.blocks():
            task_vectors = group.model_blocks(block) - group.base_block(block)
            elected = weighted_sum(trimmed(task_vectors, thresholds, block), weights)
            balance += int((elected > 0).sum()) - int((elected < 0).sum())
    return (balance > 0) - (balance < 0)
