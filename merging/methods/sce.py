"""SCE: select where models vary, calculate weights, erase minority signs. Wan et al. 2024, arXiv:2408.07990."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merging.ops.consensus import add_to
from merging.ops.kernels.kernels import kernels
from merging.ops.selection import select, share, top_threshold
from merging.ops.tensor_blocks import Block, PerBlock, TensorGroup, row_sums
from merging.recipe.method_registry import merge_method


def weights_of(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Select the entries of highest variance, and weight each model by its mean square over them.

    Equal weights where the mean squares add up to less than 1e-6, as mergekit does (typical of fine-tuned models).
    """
    topk, n = parameters["select_topk"], len(group.finetuned)
    compiled = kernels() if group.device.type == "cpu" else None

    def task_vectors(block: Block) -> Tensor:
        return group.model_blocks(block) - group.base_block(block)

    def variance(block: Block) -> Tensor:
        found = None
        if compiled is not None and group.base is not None:
            found = compiled.variances(group.base[block.rows], [tensor[block.rows] for tensor in group.finetuned])
        return task_vectors(block).var(dim=0, unbiased=False) if found is None else found

    keep = group.elements
    if topk < 1:
        varying = sum(int(torch.count_nonzero(variance(block))) for block in group.blocks())
        keep = share(topk, varying)
    limit = top_threshold(group, variance, keep) if 0 < keep < group.elements else None

    def selected(block: Block) -> Tensor:
        values = variance(block)
        return select(values, limit, block) if keep else torch.zeros_like(values, dtype=torch.bool)

    squares: list[list[float]] = [[] for _ in range(n)]
    for block in group.blocks():
        kept = task_vectors(block) * selected(block)
        for i in range(n):
            squares[i] += row_sums(kept[i].double().square())
    means = [math.fsum(rows) / group.elements for rows in squares]
    total = sum(means)
    weights = [1.0 / n] * n if abs(total) < 1e-6 else [mean / total for mean in means]
    return lambda block: {"selected": selected(block), "model_weights": weights}


def sce(base: Tensor, finetuned: Tensor, *, selected: Tensor, model_weights: Sequence[float]) -> Tensor:
    """theta = theta_0 + sum_{agree} w_t tau_t / max(sum_{agree} w_t, 1e-6), agreeing with sgn(sum_t tau_t)

    base and selected (rows, ...), finetuned (n, rows, ...) -> (rows, ...).
    """
    task_vectors = (finetuned - base) * selected
    elected = task_vectors[0].clone()
    for tau in task_vectors[1:]:
        elected += tau
    total, kept = torch.zeros_like(base), torch.zeros_like(base)
    for tau, weight in zip(task_vectors, model_weights, strict=True):
        agrees = torch.where(elected >= 0, tau > 0, tau < 0) * weight
        total += tau * agrees
        kept += agrees
    return add_to(base, total / kept.clamp(min=1e-6))


METHOD = merge_method(by_entry=True, prepare=weights_of)(sce)
