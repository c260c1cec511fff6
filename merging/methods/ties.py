"""TIES-Merging. Yadav et al. 2023, arXiv:2306.01708, Algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import UsageError
from merging.methods.contract import Method
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments
from merging.ops.consensus import add_to, disjoint_sum, majority_sign, trimmed
from merging.ops.kernel_spec import WeightedSum
from merging.ops.model_scope import ModelScope, model_scope, thresholds_in
from merging.ops.order_statistics import Threshold
from merging.ops.reference import task_arithmetic_reference
from merging.ops.selection import Magnitudes, select
from merging.ops.sparse.dropping import l1_factor
from merging.ops.sparse.sparsify import trim_thresholds
from merging.ops.tensor_blocks import Block, TensorGroup


def tensor_statistics(
    group: TensorGroup,
    *,
    weights: Sequence[float],
    density: Sequence[float],
    rescale: str,
    trim_scope: str,
    zero_sum: str,
    model_statistics: ModelScope | None = None,
) -> BlockArguments:
    """Compute each model's trim threshold, and the sign of entries whose sum is zero.

    trim_scope: tensor, thresholds over this tensor; model, over whole models, from model_statistics. zero_sum:
    positive, or majority, the sign of most entries of that same scope (its authors' code: of the whole model).
    """
    thresholds: Sequence[Threshold | None]
    if trim_scope == "model":
        assert model_statistics is not None
        model_statistics.check(group, density, weights, zero_sum)
        thresholds, zero_sign = thresholds_in(group, model_statistics), model_statistics.zero_sign
    else:
        thresholds, zero_sign = trim_thresholds(group, density), 1
        if zero_sum == "majority":
            zero_sign = majority_sign([(group, thresholds)], weights)
    factors = _factors(group, thresholds) if rescale == "l1" else ()
    return ArgumentsByBlock(
        lambda block: {"thresholds": thresholds, "block": block, "zero_sign": zero_sign, "factors": factors}
    )


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
    """Return the base plus the disjoint mean of the trimmed task vectors.

        tau_t = theta_t - theta_0 where among the top density * n, else 0    (trim)
        gamma = sgn(sum_t w_t tau_t), zero_sign where the sum is zero        (elect sign)
        theta = theta_0 + lambda * sum_{agree} w_t tau_t / sum_{agree} w_t   (disjoint mean)

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...); one threshold per model, from `tensor_statistics`, and
    with `rescale: l1` one factor that its trimmed task vector is multiplied by.
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
    scaling: float,
    normalize: bool,
    zero_sum: str,
) -> Tensor:
    """Return the original's result on whole bf16 tensors, at density 1, where the scope of trimming has no effect.

    Raises:
        UsageError: for another zero-sum sign than the original's.
    """
    if zero_sum != "positive":
        raise UsageError("--numerics reference repeats the original program, which has --zero_sum positive.")
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


def kernel_spec(
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    thresholds: Sequence[Threshold | None],
    zero_sign: int,
    factors: Sequence[float],
) -> WeightedSum | None:
    """Describe a TIES block to the compiled kernel; None where trimmed task vectors are rescaled."""
    if factors:
        return None
    return WeightedSum(weights, scaling, normalize, elect=True, zero_sign=zero_sign, thresholds=thresholds)


METHOD = Method(
    merge_block=ties,
    tensor_statistics=tensor_statistics,
    model_statistics=model_scope,
    kernel_spec=kernel_spec,
    reference=reference,
    elementwise=True,
)
