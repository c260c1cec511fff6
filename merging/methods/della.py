"""DELLA. Deep et al. 2024, arXiv:2406.11617: drop small entries more often, elect a sign, average what agrees.

theta = theta_0 + lambda * mean of the entries m_t tau_t / p_t that have the elected sign,  m_t ~ Bernoulli(p_t)
"""

from __future__ import annotations

from merging.methods.contract import Method
from merging.ops.sparse.magprune import magprune_masks
from merging.ops.sparse.sparse_sum import add_agreeing, agreeing_kernel_spec

METHOD = Method(merge_block=add_agreeing, tensor_statistics=magprune_masks, kernel_spec=agreeing_kernel_spec)
