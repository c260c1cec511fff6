"""One named tensor of all the models, and the blocks of rows it is read in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Elements of one tensor per block, so that temporaries stay small. No result depends on it."""
TILE_ELEMENTS = 1 << 18
"""Elements per tile of a sum over a whole tensor. Fixed: the order of a floating-point sum is part of its result."""


@dataclass(frozen=True)
class Block:
    """Rows `start:stop` of a tensor with `row_elements` elements per row."""

    start: int
    stop: int
    row_elements: int

    @property
    def rows(self) -> slice:
        """The rows as an index into the tensor."""
        return slice(self.start, self.stop)

    @property
    def offset(self) -> int:
        """Index of the block's first element in the flattened tensor."""
        return self.start * self.row_elements

    @property
    def elements(self) -> int:
        """Number of elements in the block."""
        return (self.stop - self.start) * self.row_elements


@dataclass(frozen=True)
class TensorGroup:
    """The same tensor in the base and in every fine-tuned model, as stored, with at least one dimension.

    base (rows, ...) or None where the method has none; finetuned: n tensors (rows, ...). Blocks are read in fp32 on
    `device`. `is_embedding` marks an input embedding, whose columns in the sense of WIDEN are its rows.
    """

    name: str
    base: Tensor | None
    finetuned: tuple[Tensor, ...]
    device: torch.device
    seed: int = 42
    is_embedding: bool = False
    block_elements: int = BLOCK_ELEMENTS

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.finetuned[0].shape

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return self.finetuned[0].numel()

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in order."""
        return self._cut(self.block_elements)

    def tiles(self) -> Iterator[Block]:
        """Yield blocks whose size never changes, for sums over the whole tensor."""
        return self._cut(TILE_ELEMENTS)

    def _cut(self, elements: int) -> Iterator[Block]:
        rows = self.shape[0]
        row_elements = self.elements // rows if rows else 0
        step = max(1, elements // max(1, row_elements))
        for start in range(0, rows, step):
            yield Block(start, min(rows, start + step), row_elements)

    def base_block(self, block: Block) -> Tensor:
        """Return the base's rows (rows, ...) in fp32."""
        assert self.base is not None
        return self.base[block.rows].to(self.device, torch.float32)

    def model_blocks(self, block: Block) -> Tensor:
        """Return the models' rows, stacked (n, rows, ...), in fp32."""
        shape = (len(self.finetuned), block.stop - block.start, *self.shape[1:])
        stacked = torch.empty(shape, dtype=torch.float32, device=self.device)
        for i, tensor in enumerate(self.finetuned):
            stacked[i].copy_(tensor[block.rows])
        return stacked

    def task_vector(self, model: int, block: Block) -> Tensor:
        """Return tau_t = theta_t - theta_0 of one model for the block's rows (rows, ...), in fp32."""
        return self.finetuned[model][block.rows].to(self.device, torch.float32) - self.base_block(block)


def ordered_sum(x: Tensor) -> float:
    """Return the sum of all elements in fp64, added in an order that no number of threads changes.

    A full reduction is split by threads; sums of fixed rows, and then of their few totals, are not.
    """
    flat = x.flatten().double()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % 1024)).view(-1, 1024)
    while len(rows) > 1:
        totals = rows.sum(1)
        rows = torch.nn.functional.pad(totals, (0, -len(totals) % 1024)).view(-1, 1024)
    return float(rows[0].cpu().sum()) if len(rows) else 0.0


def row_sums(x: Tensor) -> Tensor:
    """Return the sum of each row (rows, ...) -> (rows,) in fp64, whatever rows stand beside it.

    Their exactly rounded total (math.fsum) then depends on no block size and no number of threads.
    """
    flat = x.reshape(len(x), -1).double()
    pad = -flat.shape[1] % 1024
    return torch.nn.functional.pad(flat, (0, pad)).view(len(flat), -1, 1024).sum(2).sum(1)


PerBlock: TypeAlias = Callable[[Block], Mapping[str, Any]]
"""What a method needs for one block beyond its parameters, by argument name."""

Prepare: TypeAlias = Callable[[TensorGroup, Mapping[str, Any]], PerBlock]
"""Reads a whole tensor once, before its blocks are merged: thresholds, column norms, mask streams."""
