"""Passthrough: one model as it is, perhaps scaled (to convert, reshard, or relax it by AIM)."""

from __future__ import annotations

from torch import Tensor

from merging.recipe.method_registry import merge_method


def passthrough(base: Tensor | None, finetuned: Tensor, *, scale: float) -> Tensor:
    """theta = scale * theta_1; finetuned (1, rows, ...) -> (rows, ...)."""
    return finetuned[0] * scale


METHOD = merge_method(by_entry=True)(passthrough)
