"""Comparison of results with the base while they are written, so that a result equal to the base is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merging.plan.types import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

CHANGED = "differs_from_base"
"""Key of the journal entry of the first tensor in which a result differs."""


class BaseComparison:
    """Compares results with the base, block by block, each until its first difference."""

    def __init__(self, results: int) -> None:
        self._differs = [False] * results
        self._noted = [False] * results
        self._base: Any = None
        self._row = 0

    def begin(self, tensor: object) -> None:
        """Start a tensor of the plan; tensors that are copied have no base and are passed over."""
        self._row, self._base = 0, None
        if all(self._differs) or not isinstance(tensor, TensorPlan) or tensor.base is None or not tensor.is_merged:
            return
        from merging.engine.row_groups import aligned_rows  # loads torch

        self._base = aligned_rows(tensor.base, tensor)

    def add(self, blocks: Sequence[Tensor]) -> None:
        """Compare the tensor's next rows of every result, in the result's dtype."""
        if self._base is None:
            return
        import torch

        count = blocks[0].shape[0] if blocks[0].dim() else 1
        if isinstance(self._base, torch.Tensor) and self._base.dim() > blocks[0].dim() > 1:
            self._base = self._base.flatten(0, -2)  # a stack of matrices comes as one long matrix
        base = self._base[self._row : self._row + count].to(blocks[0].dtype).reshape(-1)
        self._row += count
        for i, block in enumerate(blocks):
            self._differs[i] = self._differs[i] or not torch.equal(base, block.reshape(-1))
        if all(self._differs):
            self._base = None

    def end(self, result: int) -> dict[str, bool]:
        """Return metadata for the journal entry of one result: empty except for the first tensor that differs."""
        first = self._differs[result] and not self._noted[result]
        self._noted[result] = self._differs[result]
        return {CHANGED: True} if first else {}
