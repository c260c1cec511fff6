"""Iso-C: sum the task vectors, then make all singular values equal.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging", arXiv:2502.04959, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from merging.ops.tensor_blocks import PerBlock, TensorGroup
from merging.ops.whole_matrix import TaskMatrices, add_merged, merge_matrices, polar
from merging.recipe.method_registry import merge_method


def flatten_spectrum(matrices: TaskMatrices) -> Tensor:
    """Return the merged task vector of one matrix (rows, columns), fp64; r = min(rows, columns).

        U diag(s_1, ..., s_r) V^T = sum_t w_t tau_t
        tau = mean(s_1, ..., s_r) U V^T

    Directions of a singular value of zero, which are not unique, stay zero; they count in the mean.

    Memory: at most 20 times the matrix in fp32 (measured on a square one: 15), whatever the number of models.
    """
    isotropic, s = polar(matrices.sum(), matrices.group.name)
    return isotropic.mul_(s.sum() / min(matrices.shape))


def merged_matrices(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Merge what is a matrix; the rest is the mean of the task vectors."""
    return merge_matrices(group, parameters["weights"], flatten_spectrum)


METHOD = merge_method(prepare=merged_matrices)(add_merged)
