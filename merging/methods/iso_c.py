"""Iso-C: sum the task vectors, then make all singular values equal.

Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging", arXiv:2502.04959, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments
from merging.ops.tensor_blocks import TensorGroup
from merging.ops.whole_matrix import TaskMatrices, add_merged, merge_matrices, polar


def flatten_spectrum(matrices: TaskMatrices) -> Tensor:
    """Return the merged task vector of one matrix (rows, columns), fp64; r = min(rows, columns).

        U diag(s_1, ..., s_r) V^T = sum_t w_t tau_t
        tau = mean(s_1, ..., s_r) U V^T

    Directions of a singular value of zero, which are not unique, stay zero; they count in the mean.

    Memory: at most 20 times the matrix in fp32 (measured on a square one: 15), whatever the number of models.
    """
    isotropic, s = polar(matrices.sum(), matrices.group.name)
    return isotropic.mul_(s.sum() / min(matrices.shape))


def tensor_statistics(group: TensorGroup, *, weights: Sequence[float]) -> BlockArguments:
    """Return the merged task vector of a matrix, by block; None for other tensors, which get the mean."""
    return merge_matrices(group, weights, flatten_spectrum)


METHOD = Method(merge_block=add_merged, tensor_statistics=tensor_statistics)
