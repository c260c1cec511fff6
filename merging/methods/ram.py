"""Reinforced Agent Merging: keep changes of one model alone, average changes that several models share.

arXiv:2601.13572.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.consensus import add_to


def changes(base: Tensor, finetuned: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the task vectors, the mask of entries with |tau| > epsilon, and the number of models that have each.

    base (rows, ...), finetuned (n, rows, ...) -> (n, rows, ...), (n, rows, ...) bool, (rows, ...).
    """
    task_vectors = finetuned - base
    changed = task_vectors.abs() > epsilon
    return task_vectors, changed, changed.sum(0)


def combine(
    base: Tensor, task_vectors: Tensor, changed: Tensor, count: Tensor, unique_scale: Sequence[float]
) -> Tensor:
    """Add unique changes times their model's scale, and the mean of the shared ones; -> (rows, ...)."""
    total = torch.zeros_like(base)
    for tau, mask, scale in zip(task_vectors, changed, unique_scale, strict=True):
        total += torch.where(count == 1, tau * scale, tau / count.clamp(min=1)) * mask
    return add_to(base, total)


def ram(base: Tensor, finetuned: Tensor, *, epsilon: float) -> Tensor:
    """Return theta_0 + sum_t m_t tau_t / (number of models with |tau| > epsilon), m_t = |tau_t| > epsilon.

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...).
    """
    task_vectors, changed, count = changes(base, finetuned, epsilon)
    return combine(base, task_vectors, changed, count, [1.0] * len(finetuned))


METHOD = Method(merge_block=ram, elementwise=True)
