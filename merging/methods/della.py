"""DELLA. Deep et al. 2024, arXiv:2406.11617: drop small entries more often, elect a sign, average what agrees.

theta = theta_0 + lambda * mean of the entries m_t tau_t / p_t that have the elected sign,  m_t ~ Bernoulli(p_t)
"""

from __future__ import annotations

from merging.ops.sparse.magprune import magprune_masks
from merging.ops.sparse.sparse_sum import add_agreeing, fused_agreeing
from merging.recipe.method_registry import merge_method

METHOD = merge_method(prepare=magprune_masks, fused=fused_agreeing)(add_agreeing)
