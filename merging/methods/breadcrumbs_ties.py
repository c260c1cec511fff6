"""Model Breadcrumbs with TIES's sign election. Davari and Belilovsky 2023, arXiv:2312.06795; arXiv:2306.01708.

theta = theta_0 + lambda * sum of the entries w_t m_t tau_t that have the elected sign
"""

from __future__ import annotations

from merging.methods.contract import Method
from merging.ops.sparse.outliers import band_masks
from merging.ops.sparse.sparse_sum import add_agreeing, agreeing_kernel_spec

METHOD = Method(
    merge_block=add_agreeing, tensor_statistics=band_masks, kernel_spec=agreeing_kernel_spec, elementwise=True
)
