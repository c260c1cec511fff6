"""Adding up sparse task vectors, plainly or by elected sign: the common last step of DARE, Breadcrumbs and DELLA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from merging.methods.task_arithmetic import add_task_vectors
from merging.ops.combination import Combination
from merging.ops.consensus import add_to, disjoint_sum, nonzero_total
from merging.ops.sparse.dropping import drop_and_rescale
from merging.ops.tensor_blocks import Block


def add_sparse(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum_t w_t m_t tau_t f_t [ / sum_t w_t, if normalize ]

    base (rows, ...), finetuned (n, rows, ...), masks m (n, rows, ...) and factors f from the method -> (rows, ...).
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_task_vectors(base, task_vectors, weights, scaling, normalize)


def add_agreeing(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
    masks: Tensor,
    factors: Sequence[float | Tensor],
) -> Tensor:
    """theta = theta_0 + lambda * sum of the entries w_t m_t tau_t f_t that have the sign of their sum over t

    With normalize, divided by the sum of the weights of the entries added. Shapes as in `add_sparse`.
    """
    task_vectors = drop_and_rescale(finetuned - base, masks, factors)
    return add_to(base, disjoint_sum(task_vectors, weights, normalize) * scaling)


def fused(block: Block, arguments: Mapping[str, Any], per_block: Any, elect: bool = False) -> Combination | None:
    """Say `add_sparse` to the kernel, or with elect `add_agreeing`; per_block has `for_kernel(block)`."""
    found, total = per_block.for_kernel(block), nonzero_total(arguments["weights"])
    if found is None:
        return None
    return Combination(**arguments, total=total, elect=elect, masks=found[0], factors=found[1])


fused_agreeing = partial(fused, elect=True)
