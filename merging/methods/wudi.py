"""WUDI-Merging: optimise the merged task vector so that it disturbs no task along that task's own task vector.

Cheng et al. 2025, "Whoever Started the Interference Should End It", arXiv:2503.08099.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments
from merging.ops.tensor_blocks import TensorGroup
from merging.ops.whole_matrix import TaskMatrices, add_merged, merge_matrices

STRIP = 256
"""Rows that are optimised at a time. Fixed, so that no result depends on the size of blocks."""
NEGLIGIBLE = 1e-10
"""Eigenvalues of A below this part of the largest count as zero."""
ROUNDING = 1e-12
"""Entries of the gradient below this part of their row's largest in B count as zero."""


@dataclass(frozen=True)
class Interference:
    """WUDI's objective in two matrices: A (in, in), B (out, in), and the sum of the task vectors (out, in), in fp64.

        L(X) = sum_t ||(X - tau_t) tau_t^T||_F^2 / ||tau_t||_F^2          X, tau_t (out, in)

    is quadratic, and the rows of X are independent of each other:

        grad L = 2 (X A - B),  A = sum_t G_t,  B = sum_t tau_t G_t,  G_t = tau_t^T tau_t / ||tau_t||_F^2

    so that A and B hold everything that the optimisation needs of the task vectors.
    """

    a: Tensor
    b: Tensor
    total: Tensor

    @classmethod
    def of(cls, matrices: TaskMatrices) -> Interference:
        """Read the task vectors one after the other. A task vector of zero has no part in the objective."""
        rows, columns = matrices.shape
        total, b = (torch.zeros(rows, columns, dtype=torch.float64, device=matrices.device) for _ in range(2))
        a = total.new_zeros(columns, columns)
        for model in range(len(matrices)):
            tau = matrices.read(model)
            total += tau
            square = float(torch.linalg.vector_norm(tau)) ** 2
            if square:
                a.addmm_(tau.T, tau, alpha=1 / square)
                for strip in _strips(rows):  # tau G, from the side that needs no second matrix of that size
                    b[strip].addmm_(tau[strip] @ tau.T, tau, alpha=1 / square)
            del tau
        return cls(a, b, total)


def descend(problem: Interference, iterations: int, learning_rate: float) -> Tensor:
    """Return X (out, in) after Adam's iterations from the sum of the task vectors, which it overwrites.

    A gradient that is zero to rounding is zero: Adam's steps do not shrink with the gradient, and would blow up the
    rounding errors of a sum that interferes with nothing.
    """
    for rows in _strips(len(problem.total)):
        x, b = problem.total[rows], problem.b[rows]
        rounding = ROUNDING * b.abs().amax(dim=1, keepdim=True)
        optimizer = torch.optim.Adam([x], lr=learning_rate)
        for _ in range(iterations):
            gradient = torch.addmm(b, x, problem.a, beta=-2, alpha=2)
            x.grad = gradient.masked_fill_(gradient.abs() <= rounding, 0)
            optimizer.step()
        x.grad = None
    return problem.total


def minimise(problem: Interference) -> Tensor:
    """Return the least X with X A = B, which is X = B A^+: the limit of gradient descent from the sum.

    Every row of B is a combination of rows of the tau_t, which span the range of A, so that X A = B has a solution and
    L(X) is least there. Solutions differ within the null space of A; descent from the sum never leaves the range of A,
    and the one solution within it is B A^+. Eigenvalues below NEGLIGIBLE of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(problem.a)
    positive = values > NEGLIGIBLE * values[-1:]
    vectors = vectors[:, positive]
    result: Tensor = (problem.b @ vectors / values[positive]) @ vectors.T
    return result


def _strips(rows: int) -> Iterator[slice]:
    for start in range(0, rows, STRIP):
        yield slice(start, min(rows, start + STRIP))


def end_interference(matrices: TaskMatrices, solver: str, iterations: int, learning_rate: float) -> Tensor:
    """Return the merged task vector of one matrix (out, in), fp64.

        L(tau) = sum_t ||(tau - w_t tau_t) tau_t^T||_F^2 / ||tau_t||_F^2

    solver adam, as published: so many iterations of Adam at a fixed learning rate from tau = sum_t w_t tau_t. Its step
    is a length, not a part of the task vectors: it changes no entry by more than about iterations * learning_rate, so
    that its effect depends on their scale. solver closed_form: the minimum itself
    (`minimise`). A model of weight 0 takes no part.

    Memory: at most 10 times the matrix in fp32 and 4 times one of shape (in, in), closed_form 10 of those; whatever
    the number of models (measured on a square one: 9 and 14 in all).
    """
    problem = Interference.of(matrices)
    return minimise(problem) if solver == "closed_form" else descend(problem, iterations, learning_rate)


def tensor_statistics(
    group: TensorGroup, *, weights: Sequence[float], solver: str, iterations: int, learning_rate: float
) -> BlockArguments:
    """Return the merged task vector of a matrix, by block; None for other tensors, which `non_matrix` rules."""
    return merge_matrices(
        group, weights, lambda matrices: end_interference(matrices, solver, iterations, learning_rate)
    )


METHOD = Method(merge_block=add_merged, tensor_statistics=tensor_statistics)
