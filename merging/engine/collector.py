"""Collector of the layer statistics of one tensor: sums over its merged blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.ops.selection import select
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.plan.types import TensorPlan


class StatisticsCollector:
    """Sums over one tensor, taken block by block: squares of the task vectors and of the merged one, conflicts, drops.

    Without a base the squares are those of the weights themselves, and signs are not compared.
    """

    def __init__(self, tensor: TensorPlan) -> None:
        self.squares = [0.0] * len(tensor.models)
        self.merged = 0.0
        self.elements = self.changed = self.moved = self.conflicts = 0
        self.nonzero = [0] * len(tensor.models)
        self.dropped: list[int] | None = None
        self.has_base = tensor.base is not None
        self.positions = list(tensor.positions)

    def block(self, block: Block, group: TensorGroup, merged: Tensor, given: Mapping[str, Any]) -> None:
        """Take account of a block: merged (rows, ...) fp32; `given` may hold the method's masks or thresholds."""
        base = group.base_block(block) if group.base is not None else torch.zeros_like(merged)
        vectors = group.model_blocks(block) - base
        self.elements += merged.numel()
        self.changed += int((merged != base).sum())
        self.merged += float((merged - base).double().square().sum())
        positive, negative = (vectors > 0).any(0), (vectors < 0).any(0)
        self.moved += int((positive | negative).sum())
        self.conflicts += int((positive & negative).sum())
        kept = _kept(vectors, given, block)
        self.dropped = [0] * len(vectors) if kept is not None and self.dropped is None else self.dropped
        for i, vector in enumerate(vectors):
            self.squares[i] += float(vector.double().square().sum())
            self.nonzero[i] += int((vector != 0).sum())
            if kept is not None and self.dropped is not None:
                self.dropped[i] += int(((vector != 0) & ~kept[i]).sum())

    def summary(self) -> Mapping[str, Any]:
        """Return the sums."""
        return vars(self)


def _kept(vectors: Tensor, given: Mapping[str, Any], block: Block) -> Tensor | None:
    """Which entries of the task vectors (n, rows, ...) a sparse method keeps; None for a method that keeps all."""
    if "masks" in given:
        result: Tensor | None = given["masks"]
        return result
    if "thresholds" in given:
        limits = zip(vectors, given["thresholds"], strict=True)
        return torch.stack([select(vector.abs(), limit, block) for vector, limit in limits])
    return None
