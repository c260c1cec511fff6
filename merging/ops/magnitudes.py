"""Magnitudes |tau_t| of one model's task vector, which trimming ranks; a compiled kernel counts them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merging.ops.kernels.kernels import kernels
from merging.ops.order_statistics import UPPER_BINS, lower_counts, upper_counts
from merging.ops.tensor_blocks import Block, TensorGroup


@dataclass(frozen=True)
class Magnitudes:
    """|theta_t - theta_0| of model number `model`, (rows, ...) fp32 when called with a block."""

    group: TensorGroup
    model: int

    def __call__(self, block: Block) -> Tensor:
        """Return the magnitudes of a block."""
        return self.group.task_vector(self.model, block).abs_()

    @property
    def compiled(self) -> bool:
        """True where a kernel counts the stored tensors, several blocks at a time.

        It does so whatever device computes the blocks: a count is the same everywhere, and partial counts from a GPU
        would have to be waited for.
        """
        return kernels() is not None

    def upper_counts(self, block: Block) -> Tensor:
        """Return `order_statistics.upper_counts` of the block's values."""
        compiled = kernels()
        if compiled is not None:
            counts = torch.zeros(UPPER_BINS, dtype=torch.int64)
            if compiled.upper_halves(*self._stored(block), counts):
                return counts
        return upper_counts(self(block))  # NaN is left out

    def lower_counts(self, block: Block, upper: int) -> tuple[Tensor, Tensor]:
        """Return `order_statistics.lower_counts` of the block's values."""
        compiled = kernels()
        return compiled.lower_halves(*self._stored(block), upper) if compiled else lower_counts(self(block), upper)

    def _stored(self, block: Block) -> tuple[Tensor, Tensor]:
        assert self.group.base is not None
        return self.group.base[block.rows], self.group.finetuned[self.model][block.rows]
