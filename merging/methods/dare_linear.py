"""DARE with task arithmetic. Yu et al. 2023, arXiv:2311.03099.

theta = theta_0 + lambda * sum_t w_t (m_t * tau_t) / density_t,  m_t ~ Bernoulli(density_t)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.reference import task_arithmetic_reference
from merging.ops.sparse.dropping import random_masks
from merging.ops.sparse.sparse_sum import add_sparse, sparse_kernel_spec


def reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    weights: Sequence[float],
    scaling: float,
    normalize: bool,
) -> Tensor:
    """Return the original's result on whole bf16 tensors, at density 1, where nothing is dropped."""
    return task_arithmetic_reference(
        base, finetuned, weights=weights, consensus=False, normalize=normalize, scaling=scaling
    )


METHOD = Method(
    merge_block=add_sparse,
    tensor_statistics=random_masks,
    kernel_spec=sparse_kernel_spec,
    reference=reference,
    elementwise=True,
)
