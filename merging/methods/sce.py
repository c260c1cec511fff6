"""SCE: select where models vary, calculate weights, erase minority signs. Wan et al. 2024, arXiv:2408.07990."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.checkpoints.row_sums import row_sums
from merging.methods.contract import Method
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments
from merging.ops.consensus import add_to
from merging.ops.kernels.kernels import kernels
from merging.ops.selection import select, share, top_threshold
from merging.ops.tensor_blocks import Block, TensorGroup


def tensor_statistics(group: TensorGroup, *, select_topk: float) -> BlockArguments:
    """Select the entries of highest variance, and weight each model by its mean square over them.

    Equal weights where the mean squares add up to less than 1e-6, as mergekit does (typical of fine-tuned models).
    """
    n = len(group.finetuned)
    compiled = kernels() if group.device.type == "cpu" else None

    def task_vectors(block: Block) -> Tensor:
        return group.model_blocks(block) - group.base_block(block)

    def variance(block: Block) -> Tensor:
        by_kernel = None
        if compiled is not None and group.base is not None:
            by_kernel = compiled.variances(group.base[block.rows], [tensor[block.rows] for tensor in group.finetuned])
        return task_vectors(block).var(dim=0, unbiased=False) if by_kernel is None else by_kernel

    keep = group.elements
    if select_topk < 1:
        varying = sum(int(torch.count_nonzero(variance(block))) for block in group.blocks())
        keep = share(select_topk, varying)
    limit = top_threshold(group, variance, keep) if 0 < keep < group.elements else None

    def selected(block: Block) -> Tensor:
        values = variance(block)
        return select(values, limit, block) if keep else torch.zeros_like(values, dtype=torch.bool)

    squares: list[list[float]] = [[] for _ in range(n)]
    for block in group.blocks():
        sparse = task_vectors(block) * selected(block)
        for i in range(n):
            squares[i] += row_sums(sparse[i].double().square())
    means = [math.fsum(rows) / group.elements for rows in squares]
    total = sum(means)
    weights = [1.0 / n] * n if abs(total) < 1e-6 else [mean / total for mean in means]
    return ArgumentsByBlock(lambda block: {"selected": selected(block), "model_weights": weights})


def sce(base: Tensor, finetuned: Tensor, *, selected: Tensor, model_weights: Sequence[float]) -> Tensor:
    """Return theta_0 + sum_{agree} w_t tau_t / max(sum_{agree} w_t, 1e-6), agreeing with sgn(sum_t tau_t).

    base and selected (rows, ...), finetuned (n, rows, ...) -> (rows, ...).
    """
    task_vectors = (finetuned - base) * selected
    elected = task_vectors[0].clone()
    for tau in task_vectors[1:]:
        elected += tau
    total, weight_added = torch.zeros_like(base), torch.zeros_like(base)
    for tau, weight in zip(task_vectors, model_weights, strict=True):
        agrees = torch.where(elected >= 0, tau > 0, tau < 0) * weight
        total += tau * agrees
        weight_added += agrees
    return add_to(base, total / weight_added.clamp(min=1e-6))


METHOD = Method(merge_block=sce, tensor_statistics=tensor_statistics, elementwise=True)
