"""Collector of the layer statistics of one tensor: sums over its merged blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.ops.selection import select
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.plan.types import TensorPlan


class StatisticsCollector:
    """Sums over the blocks of one tensor: squares of the task vectors and of the merged one, sign conflicts, drops.

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

    def block(self, block: Block, group: TensorGroup, merged: Tensor, arguments: Mapping[str, object]) -> None:
        """Add a block: merged (rows, ...) fp32; `arguments` may hold the method's masks or thresholds."""
        base = group.base_block(block) if group.base is not None else torch.zeros_like(merged)
        vectors = group.model_blocks(block) - base
        self.elements += merged.numel()
        self.changed += int((merged != base).sum())
        self.merged += float((merged - base).double().square().sum())
        positive, negative = (vectors > 0).any(0), (vectors < 0).any(0)
        self.moved += int((positive | negative).sum())
        self.conflicts += int((positive & negative).sum())
        masks = _masks(vectors, arguments, block)
        self.dropped = [0] * len(vectors) if masks is not None and self.dropped is None else self.dropped
        for i, vector in enumerate(vectors):
            self.squares[i] += float(vector.double().square().sum())
            self.nonzero[i] += int((vector != 0).sum())
            if masks is not None and self.dropped is not None:
                self.dropped[i] += int(((vector != 0) & ~masks[i]).sum())

    def summary(self) -> Mapping[str, object]:
        """Return the sums."""
        return vars(self)


def _masks(vectors: Tensor, arguments: Mapping[str, object], block: Block) -> Tensor | None:
    """Return the mask of the entries that a sparse method keeps, (n, rows, ...); None for a method that keeps all."""
    masks, thresholds = arguments.get("masks"), arguments.get("thresholds")
    if isinstance(masks, Tensor):
        return masks
    if isinstance(thresholds, Sequence):
        pairs = zip(vectors, thresholds, strict=True)
        return torch.stack([select(vector.abs(), threshold, block) for vector, threshold in pairs])
    return None
