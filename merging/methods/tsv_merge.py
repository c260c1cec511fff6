"""TSV-Merge (TSV-M): keep each task's leading singular vectors, decorrelate them, put them together.

Gargiulo et al. 2025, "Task Singular Vectors", arXiv:2412.00081, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.ops.tensor_blocks import PerBlock, TensorGroup
from merging.ops.whole_matrix import TaskMatrices, add_merged, decompose, merge_matrices, polar
from merging.recipe.method_registry import merge_method


def merge_singular_vectors(matrices: TaskMatrices) -> Tensor:
    """Return the merged task vector of one matrix (rows, columns), fp64; r = min(rows, columns), n models.

        U_t S_t V_t^T = w_t tau_t, the first floor(r / n) singular values
        U = [U_1 ... U_n], S = diag(S_1, ..., S_n), V = [V_1 ... V_n]
        tau = U' S V'^T, U' and V' nearest to U and V with orthonormal columns (Procrustes: P Q^T of the SVD P D Q^T)

    Singular values of zero to fp32 rounding, such as a low-rank adapter has, are left out with their arbitrary vectors,
    which would displace those of the other models. Vectors that are linearly dependent between models have no unique
    nearest orthonormal set: their excess directions contribute nothing. A matrix with r < n is the mean.

    Memory: at most 24 times the matrix in fp32 (measured on a square one: 17 with 3 models, 20 with 8).
    """
    keep = min(matrices.shape) // len(matrices)
    if keep == 0:
        return matrices.sum() / len(matrices)
    name = matrices.group.name
    left, values, right = [], [], []
    for model in range(len(matrices)):
        u, s, vh = decompose(matrices.read(model), name, torch.float32)
        left.append(u[:, :keep].clone())  # a view would keep all of it
        values.append(s[:keep])
        right.append(vh[:keep].clone())
        del u, vh
    u, vh = torch.cat(left, dim=1), torch.cat(right)
    del left, right
    u, _ = polar(u, name)
    vh, _ = polar(vh, name)
    return u.mul_(torch.cat(values)) @ vh


def merged_matrices(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Merge what is a matrix; the rest is the mean of the task vectors."""
    return merge_matrices(group, parameters["weights"], merge_singular_vectors)


METHOD = merge_method(prepare=merged_matrices)(add_merged)
