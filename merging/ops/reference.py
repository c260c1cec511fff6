"""Arithmetic of the original pipeline: everything in bf16, on whole tensors, in the order of mergekit 0.1.5.

Used by `--numerics reference` only. Reproduces, bit for bit, the output of the original merge.py for
density 1: each rounding of the original is a rounding here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_arithmetic_reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    weights: Sequence[float],
    consensus: bool,
    normalize: bool,
    scaling: float,
) -> Tensor:
    """Return the result of task arithmetic, with sign election if `consensus`, in the tensors' dtype (bf16); (...)."""
    task_vectors = torch.stack([tensor - base for tensor in finetuned])
    w = torch.tensor(weights, dtype=base.dtype).reshape(-1, *[1] * base.dim())
    weighted = task_vectors * w
    if consensus:
        elected = torch.where(weighted.sum(dim=0) >= 0, 1, -1).to(base.dtype)
        agrees = weighted.sign() == elected
        merged = (weighted * agrees).sum(dim=0)
        divisor = (w * agrees).sum(dim=0)
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    else:
        merged = weighted.sum(dim=0)
        divisor = w.sum(dim=0)
        divisor = torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
    if normalize:
        merged = merged / divisor
    if scaling != 1:
        merged = merged * scaling
    return base + merged


def linear_reference(finetuned: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """Return the weighted average, accumulated in fp32 by fused multiply-adds, rounded to the dtype of the tensors."""
    w = torch.tensor(weights, dtype=torch.float32)
    total = torch.zeros(finetuned[0].shape, dtype=torch.float32)
    for tensor, weight in zip(finetuned, w.unbind(), strict=True):
        total.addcmul_(tensor, weight)
    if normalize:
        total /= w.sum()
    return total.to(finetuned[0].dtype)
