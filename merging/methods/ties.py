"""TIES-Merging. Yadav et al. 2023, arXiv:2306.01708, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.errors import UsageError
from merging.ops.combination import Combination
from merging.ops.consensus import add_to, disjoint_sum, majority_sign, trimmed
from merging.ops.magnitudes import Magnitudes
from merging.ops.model_scope import survey, thresholds_in
from merging.ops.reference import task_arithmetic_reference
from merging.ops.selection import Threshold, select
from merging.ops.sparse.dropping import l1_factor
from merging.ops.sparse.sparsify import trim_thresholds
from merging.ops.tensor_blocks import Block, PerBlock, TensorGroup
from merging.recipe.method_registry import merge_method


def thresholds_of(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Find each model's trim threshold, and the sign of entries whose sum is zero.

    trim_scope: tensor, over this tensor; model, over all of them, from the survey. zero_sum: positive, or majority,
    the sign that most entries of that same scope have (its authors' code: of the whole model).
    """
    if parameters["trim_scope"] == "model":
        found = parameters["survey"]
        found.check(group, parameters)
        thresholds, zero_sign = thresholds_in(group, found), found.zero_sign
    else:
        thresholds, zero_sign = trim_thresholds(group, parameters["density"]), 1
        if parameters["zero_sum"] == "majority":
            zero_sign = majority_sign([(group, thresholds)], parameters["weights"])
    factors = _factors(group, thresholds) if parameters["rescale"] == "l1" else ()
    return lambda block: {"thresholds": thresholds, "block": block, "zero_sign": zero_sign, "factors": factors}


def _factors(group: TensorGroup, thresholds: Sequence[Threshold | None]) -> tuple[float, ...]:
    """Ratio of the l1 norms of each task vector before and after trimming (mergekit 0.1.5, `rescale: true`)."""

    def mask(model: int, block: Block) -> Tensor:
        values, threshold = Magnitudes(group, model)(block), thresholds[model]
        return torch.ones_like(values, dtype=torch.bool) if threshold is None else select(values, threshold, block)

    return tuple(l1_factor(group, model, mask) for model in range(len(thresholds)))


def ties(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    thresholds: Sequence[Threshold | None],
    block: Block,
    zero_sign: int,
    factors: Sequence[float] = (),
) -> Tensor:
    """Trim, elect sign, disjoint mean.

        tau_t = theta_t - theta_0 where among the top density * n, else 0    (trim)
        gamma = sgn(sum_t w_t tau_t), zero_sign where the sum is zero        (elect sign)
        theta = theta_0 + lambda * sum_{agree} w_t tau_t / sum_{agree} w_t   (disjoint mean)

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...); one threshold per model, from `thresholds_of`, and one
    factor that its trimmed task vector is multiplied by, where there are any.
    """
    task_vectors = trimmed(finetuned - base, thresholds, block)
    for task_vector, factor in zip(task_vectors, factors, strict=bool(factors)):
        task_vector *= factor
    return add_to(base, disjoint_sum(task_vectors, weights, normalize, zero_sign) * scaling)


def reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    weights: Sequence[float],
    density: Sequence[float],
    scaling: float,
    normalize: bool,
    zero_sum: str,
    trim_scope: str,
    rescale: str,
) -> Tensor:
    """The original's arithmetic on whole bf16 tensors, at density 1, where no scope matters.

    Raises UsageError for another zero-sum sign than the original's.
    """
    if zero_sum != "positive":
        raise UsageError("--numerics reference repeats the original program, which has --zero_sum positive.")
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


def fused(block: Block, arguments: Mapping[str, Any], per_block: PerBlock) -> Combination | None:
    """Describe a TIES block to the compiled kernel; None where trimmed task vectors are rescaled."""
    found = per_block(block)
    if found["factors"]:
        return None
    return Combination(**arguments, elect=True, zero_sign=found["zero_sign"], thresholds=found["thresholds"])


METHOD = merge_method(by_entry=True, reference=reference, prepare=thresholds_of, survey=survey, fused=fused)(ties)
