"""WUDI-Merging: optimise the merged task vector so that it disturbs no task along that task's own task vector.

Cheng et al. 2025, "Whoever Started the Interference Should End It", arXiv:2503.08099.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from merging.ops.interference import Interference, descend, minimise
from merging.ops.tensor_blocks import PerBlock, TensorGroup
from merging.ops.whole_matrix import TaskMatrices, add_merged, merge_matrices
from merging.recipe.method_registry import merge_method


def end_interference(matrices: TaskMatrices, solver: str, iterations: int, learning_rate: float) -> Tensor:
    """Return the merged task vector of one matrix (out, in), fp64.

        L(tau) = sum_t ||(tau - w_t tau_t) tau_t^T||_F^2 / ||tau_t||_F^2

    solver adam, as published: so many iterations of Adam at a fixed learning rate from tau = sum_t w_t tau_t. Its step
    is a length, not a part of the task vectors: it moves no entry by more than about iterations * learning_rate, so
    that what it does depends on their scale. solver closed_form: the minimum itself
    (`merging.ops.interference.minimise`). A model of weight 0 takes no part.

    Memory: at most 10 times the matrix in fp32 and 4 times one of shape (in, in), closed_form 10 of those; whatever
    the number of models (measured on a square one: 9 and 14 in all).
    """
    problem = Interference.of(matrices)
    return minimise(problem) if solver == "closed_form" else descend(problem, iterations, learning_rate)


def merged_matrices(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Merge what is a matrix; the rest is what `non_matrix` says."""
    settings = parameters["solver"], parameters["iterations"], parameters["learning_rate"]
    return merge_matrices(group, parameters["weights"], lambda matrices: end_interference(matrices, *settings))


METHOD = merge_method(prepare=merged_matrices)(add_merged)
