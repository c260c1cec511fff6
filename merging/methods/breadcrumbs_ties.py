"""Model Breadcrumbs with TIES's sign election. Davari and Belilovsky 2023, arXiv:2312.06795; arXiv:2306.01708.

theta = theta_0 + lambda * sum of the entries w_t m_t tau_t that have the elected sign
"""

from __future__ import annotations

from merging.ops.sparse.outliers import band_masks
from merging.ops.sparse.sparse_sum import add_agreeing, fused_agreeing
from merging.recipe.method_registry import merge_method

METHOD = merge_method(by_entry=True, prepare=band_masks, fused=fused_agreeing)(add_agreeing)
