"""Passthrough: one model unchanged, or scaled (to convert, reshard, or relax it by AIM). As in mergekit 0.1.5."""

from __future__ import annotations

from torch import Tensor

from merging.methods.contract import Method


def passthrough(base: Tensor | None, finetuned: Tensor, *, scale: float) -> Tensor:
    """Return scale * theta_1; finetuned (1, rows, ...) -> (rows, ...)."""
    return finetuned[0] * scale


METHOD = Method(merge_block=passthrough, elementwise=True)
