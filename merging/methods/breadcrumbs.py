"""Model Breadcrumbs with task arithmetic. Davari and Belilovsky 2023, arXiv:2312.06795.

theta = theta_0 + lambda * sum_t w_t m_t * tau_t,  m_t the band between the largest and the small entries
"""

from __future__ import annotations

from merging.methods.contract import Method
from merging.ops.sparse.outliers import band_masks
from merging.ops.sparse.sparse_sum import add_sparse, sparse_kernel_spec

METHOD = Method(merge_block=add_sparse, tensor_statistics=band_masks, kernel_spec=sparse_kernel_spec, elementwise=True)
