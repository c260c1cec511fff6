"""Task arithmetic. Ilharco et al. 2023, arXiv:2212.04089."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from merging.ops.combination import Combination
from merging.ops.consensus import add_to, divided, nonzero_total, weighted_sum
from merging.ops.reference import task_arithmetic_reference
from merging.ops.tensor_blocks import Block, PerBlock
from merging.recipe.method_registry import merge_method


def add_task_vectors(
    base: Tensor, task_vectors: Tensor, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t tau_t [ / sum_t w_t, if normalize ]

    base (rows, ...), task_vectors (n, rows, ...) -> (rows, ...).
    """
    merged = weighted_sum(task_vectors, weights)
    if normalize:
        merged = divided(merged, nonzero_total(weights))
    return add_to(base, merged * scaling)


def task_arithmetic(
    base: Tensor, finetuned: Tensor, *, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """Add the weighted task vectors tau_t = theta_t - theta_0; finetuned (n, rows, ...) -> (rows, ...)."""
    return add_task_vectors(base, finetuned - base, weights, scaling, normalize)


def reference(
    base: Tensor, finetuned: Sequence[Tensor], *, weights: Sequence[float], scaling: float, normalize: bool
) -> Tensor:
    """The original's arithmetic on whole bf16 tensors."""
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=False, normalize=normalize, scaling=scaling
    )


def fused(block: Block, arguments: Mapping[str, Any], per_block: PerBlock | None) -> Combination:
    """Say `task_arithmetic` to the kernel."""
    return Combination(**arguments, total=nonzero_total(arguments["weights"]))


METHOD = merge_method(by_entry=True, reference=reference, fused=fused)(task_arithmetic)
