"""Task arithmetic. Ilharco et al. 2023, arXiv:2212.04089."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.consensus import add_task_vectors, nonzero_total
from merging.ops.kernel_spec import WeightedSum
from merging.ops.reference import task_arithmetic_reference


def task_arithmetic(
    base: Tensor, finetuned: Tensor, *, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """Return theta_0 + lambda * sum_t w_t tau_t [ / sum_t w_t, if normalize ], tau_t = theta_t - theta_0.

    base (rows, ...), finetuned (n, rows, ...), weights w (n,) -> (rows, ...).
    """
    return add_task_vectors(base, finetuned - base, weights, scaling, normalize)


def reference(
    base: Tensor, finetuned: Sequence[Tensor], *, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """Return the original's result on whole bf16 tensors."""
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=False, normalize=normalize, scaling=scaling
    )


def kernel_spec(*, weights: Sequence[float], scaling: float, normalize: bool) -> WeightedSum:
    """Describe the weighted sum of task vectors to the compiled kernel."""
    return WeightedSum(weights, scaling, normalize, nonzero_total(weights))


METHOD = Method(merge_block=task_arithmetic, kernel_spec=kernel_spec, reference=reference, elementwise=True)
