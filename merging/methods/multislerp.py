"""Multi-SLERP: a weighted barycentre on the sphere of directions. C. Goddard 2025, as in mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import CheckpointError
from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.consensus import add_to, weighted_sum
from merging.ops.gram import gram, length, norms
from merging.ops.tensor_blocks import TensorGroup


def tensor_statistics(
    group: TensorGroup, *, weights: Sequence[float], normalize_weights: bool, eps: float
) -> BlockArguments:
    """Compute each model's coefficient from the inner products of the tensors (of the task vectors, with a base)."""
    if len(group.finetuned) == 1:
        return ConstantArguments(coefficients=[1.0])
    products = gram(group, relative=group.base is not None)
    return ConstantArguments(coefficients=barycenter(group.name, products, weights, normalize_weights, eps))


def barycenter(
    name: str, products: Tensor, weights: Sequence[float], normalize_weights: bool, eps: float
) -> list[float]:
    """Return the coefficient of each of n vectors from their inner products (n, n) fp64.

    u_i = x_i / |x_i|; m = sum w_i u_i normalised; v = sum w_i (u_i - <u_i, m> m); the result is
    (cos|v| m + sin|v| v / |v|) * sum w_i |x_i|. Raises CheckpointError where three or more directions cancel.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if normalize_weights:
        w = w / w.sum()
    lengths = norms(products)
    unit = 1.0 / (lengths + eps)
    mean = w * unit
    size = length(mean, products)
    if size < eps:
        if len(w) > 2 and float(lengths.max()) > eps:
            raise CheckpointError(f"{name}: the models' directions cancel; use other --weights.")
        return w.tolist()
    mean = mean / size
    dots = (products @ mean) * unit
    tangent = w * unit - float((w * dots).sum()) * mean
    angle = length(tangent, products) + eps
    result = mean * torch.cos(torch.tensor(angle)) + tangent * (torch.sin(torch.tensor(angle)) / angle)
    result = result * float((lengths * w).sum())
    value: list[float] = result.tolist()
    return value


def multislerp(base: Tensor | None, finetuned: Tensor, *, coefficients: Sequence[float]) -> Tensor:
    """Return [theta_0 +] sum_t c_t x_t, x_t the models' tensors, or with a base their task vectors.

    base (rows, ...) or None, finetuned (n, rows, ...) -> (rows, ...).
    """
    if base is None:
        return weighted_sum(finetuned, coefficients)
    return add_to(base, weighted_sum(finetuned - base, coefficients))


METHOD = Method(merge_block=multislerp, tensor_statistics=tensor_statistics, elementwise=True)
