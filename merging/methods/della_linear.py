"""DELLA with task arithmetic. Deep et al. 2024, arXiv:2406.11617: drop small entries more often, add up the rest.

theta = theta_0 + lambda * sum_t w_t m_t tau_t / p_t,  m_t ~ Bernoulli(p_t)
"""

from __future__ import annotations

from merging.methods.contract import Method
from merging.ops.sparse.magprune import magprune_masks
from merging.ops.sparse.sparse_sum import add_sparse, sparse_kernel_spec

METHOD = Method(merge_block=add_sparse, tensor_statistics=magprune_masks, kernel_spec=sparse_kernel_spec)
