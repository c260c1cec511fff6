"""DARE with TIES's sign election. Yu et al. 2023, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708.

tau_t = m_t * (theta_t - theta_0) / density_t,  m_t ~ Bernoulli(density_t)
theta = theta_0 + lambda * sum_{sgn(w_t tau_t) = sgn(sum_s w_s tau_s)} w_t tau_t
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.reference import task_arithmetic_reference
from merging.ops.sparse.dropping import random_masks
from merging.ops.sparse.sparse_sum import add_agreeing, agreeing_kernel_spec


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
        base, finetuned, weights=weights, consensus=True, normalize=normalize, scaling=scaling
    )


METHOD = Method(
    merge_block=add_agreeing,
    tensor_statistics=random_masks,
    kernel_spec=agreeing_kernel_spec,
    reference=reference,
    elementwise=True,
)
