"""TIES-Merging. Yadav et al. 2023, arXiv:2306.01708, Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from console.errors import UsageError
from merging.combination import Combination
from merging.consensus import disjoint_sum, majority_sign, trimmed
from merging.model_scope import survey, thresholds_in
from merging.reference import task_arithmetic_reference
from merging.registry import merge_method
from merging.selection import Threshold
from merging.sparsify import trim_thresholds
from merging.tensors import Block, PerBlock, TensorGroup


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
    return lambda block: {"thresholds": thresholds, "block": block, "zero_sign": zero_sign}


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
) -> Tensor:
    """Trim, elect sign, disjoint mean.

        tau_t = theta_t - theta_0 where among the top density * n, else 0    (trim)
        gamma = sgn(sum_t w_t tau_t), zero_sign where the sum is zero        (elect sign)
        theta = theta_0 + lambda * sum_{agree} w_t tau_t / sum_{agree} w_t   (disjoint mean)

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...); one threshold per model, from `thresholds_of`.
    """
    task_vectors = trimmed(finetuned - base, thresholds, block)
    return base + disjoint_sum(task_vectors, weights, normalize, zero_sign) * scaling


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
) -> Tensor:
    """The original's arithmetic on whole bf16 tensors, at density 1, where no scope matters.

    Raises UsageError for another zero-sum sign than the original's.
    """
    if zero_sum != "positive":
        raise UsageError("--numerics reference repeats the original program, which has --zero_sum positive.")
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


def fused(block: Block, arguments: Mapping[str, Any], per_block: PerBlock) -> Combination:
    """Say `ties` to the kernel."""
    found = per_block(block)
    return Combination(**arguments, elect=True, zero_sign=found["zero_sign"], thresholds=found["thresholds"])


METHOD = merge_method(by_entry=True, reference=reference, prepare=thresholds_of, survey=survey, fused=fused)(ties)
