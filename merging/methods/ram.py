"""Reinforced Agent Merging: what one model alone changed is kept whole, what several changed is averaged.

arXiv:2601.13572.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merging.ops.consensus import add_to
from merging.recipe.method_registry import merge_method


def changes(base: Tensor, finetuned: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the task vectors, which of their entries changed by more than epsilon, and by how many models.

    base (rows, ...), finetuned (n, rows, ...) -> (n, rows, ...), (n, rows, ...) bool, (rows, ...).
    """
    task_vectors = finetuned - base
    changed = task_vectors.abs() > epsilon
    return task_vectors, changed, changed.sum(0)


def combine(base: Tensor, task_vectors: Tensor, changed: Tensor, count: Tensor, unique_scale: list[float]) -> Tensor:
    """Add unique changes times their model's scale, and the mean of the shared ones; -> (rows, ...)."""
    total = torch.zeros_like(base)
    for tau, mine, scale in zip(task_vectors, changed, unique_scale, strict=True):
        total += torch.where(count == 1, tau * scale, tau / count.clamp(min=1)) * mine
    return add_to(base, total)


def ram(base: Tensor, finetuned: Tensor, *, epsilon: float) -> Tensor:
    """theta = theta_0 + sum_t m_t tau_t / (number of models with |tau| > epsilon), m_t = |tau_t| > epsilon

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...).
    """
    task_vectors, changed, count = changes(base, finetuned, epsilon)
    return combine(base, task_vectors, changed, count, [1.0] * len(finetuned))


METHOD = merge_method(by_entry=True)(ram)
