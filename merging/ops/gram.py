"""Inner products of whole tensors, in fp64: the statistic that the spherical methods need.

Their results lie in the span of the models, so that a method computes its coefficients from this small matrix and the
weighted sum is then taken block by block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merging.checkpoints.row_sums import row_sums
from merging.ops.tensor_blocks import TensorGroup


def gram(group: TensorGroup, relative: bool = False, with_base: bool = False) -> Tensor:
    """Return <x_i, x_j> (n, n) fp64 on the CPU over the models' tensors.

    relative: of the task vectors instead; with_base: the base first, then the models. Rows are summed alone, and their
    total is rounded once, so that no block size or thread count enters.
    """
    n = len(group.finetuned) + with_base
    pairs: dict[tuple[int, int], list[float]] = {(i, j): [] for i in range(n) for j in range(i + 1)}
    for block in group.blocks():
        x = group.model_blocks(block).double()
        if relative or with_base:
            base = group.base_block(block).double()
            x = x - base if relative else torch.cat([base[None], x])
        for (i, j), rows in pairs.items():
            rows += row_sums(x[i] * x[j])
    products = torch.zeros(n, n, dtype=torch.float64)
    for (i, j), rows in pairs.items():
        products[i, j] = products[j, i] = math.fsum(rows)
    return products


def norms(products: Tensor) -> Tensor:
    """Return the norms (n,) of n vectors from their inner products (n, n)."""
    return products.diagonal().clamp(min=0).sqrt()


def length(coefficients: Tensor, products: Tensor) -> float:
    """Return the norm of sum_i c_i x_i from the inner products of the x_i."""
    return float((coefficients @ products @ coefficients).clamp(min=0).sqrt())
