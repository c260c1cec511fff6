"""Karcher mean: the point of the sphere nearest to all models' directions, times their mean norm. arXiv:2603.04972."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.consensus import weighted_sum
from merging.ops.gram import gram, length, norms
from merging.ops.tensor_blocks import TensorGroup


def tensor_statistics(group: TensorGroup, *, max_iter: int, tol: float) -> BlockArguments:
    """Compute the coefficients in the span of the models: m <- exp_m(mean of log_m(u_i)), from inner products alone."""
    n = len(group.finetuned)
    if n == 1:
        return ConstantArguments(coefficients=[1.0])
    products = gram(group)
    lengths = norms(products)
    used = [i for i in range(n) if float(lengths[i]) > tol]
    if not used:
        return ConstantArguments(coefficients=[0.0] * n)
    units = torch.zeros(n, n, dtype=torch.float64)
    for i in used:
        units[i, i] = 1.0 / lengths[i]
    mean = units.sum(0) / len(used)
    size = length(mean, products)
    mean = units[used[0]] if size < tol else mean / size
    for _ in range(max_iter):
        tangent = torch.zeros(n, dtype=torch.float64)
        for i in used:
            dot = max(-1.0, min(1.0, float(mean @ products @ units[i])))
            theta = math.acos(dot)
            if theta >= tol:
                tangent += (theta / math.sin(theta)) * (units[i] - dot * mean) / len(used)
        step = length(tangent, products)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean = mean / length(mean, products)
    result = mean * float(lengths.sum()) / n
    return ConstantArguments(coefficients=result.tolist())


def karcher(base: Tensor | None, finetuned: Tensor, *, coefficients: Sequence[float]) -> Tensor:
    """Return sum_t c_t theta_t, the spherical mean of the directions at the mean of the norms.

    finetuned (n, rows, ...), coefficients c (n,) -> (rows, ...); the base has no effect.
    """
    return weighted_sum(finetuned, coefficients)


METHOD = Method(merge_block=karcher, tensor_statistics=tensor_statistics, elementwise=True)
