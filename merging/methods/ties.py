"""TIES-Merging. Yadav et al. 2023, arXiv:2306.01708, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.consensus import disjoint_sum
from merging.reference import task_arithmetic_reference
from merging.registry import merge_method
from merging.selection import Threshold
from merging.sparsify import trim, trim_threshold
from merging.tensors import Block, PerBlock, TensorGroup


def thresholds_of(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Find each model's trim threshold over the whole tensor."""
    thresholds = [trim_threshold(group, i, density) for i, density in enumerate(parameters["density"])]
    return lambda block: {"thresholds": thresholds, "block": block}


def ties(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    thresholds: Sequence[Threshold | None],
    block: Block,
) -> Tensor:
    """Trim, elect sign, disjoint mean.

        tau_t = theta_t - theta_0 where among the top density * n, else 0    (trim)
        gamma = sgn(sum_t w_t tau_t)                                         (elect sign)
        theta = theta_0 + lambda * sum_{agree} w_t tau_t / sum_{agree} w_t   (disjoint mean)

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...); one threshold per model, from `thresholds_of`.
    """
    task_vectors = finetuned - base
    trimmed = torch.stack([trim(tau, limit, block) for tau, limit in zip(task_vectors, thresholds, strict=True)])
    return base + disjoint_sum(trimmed, weights, normalize) * scaling


def reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    weights: Sequence[float],
    density: Sequence[float],
    scaling: float,
    normalize: bool,
) -> Tensor:
    """The original's arithmetic on whole bf16 tensors, at density 1."""
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


METHOD = merge_method(reference=reference, prepare=thresholds_of)(ties)
