"""One named tensor of all the models, and the blocks of rows in which it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merging.checkpoints.storage import Rows

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


def cut(shape: torch.Size, elements: int) -> Iterator[Block]:
    """Yield blocks of whole rows, in order, of at most `elements` elements (or of one row)."""
    rows = shape[0]
    row_elements = shape.numel() // rows if rows else 0
    step = max(1, elements // max(1, row_elements))
    for start in range(0, rows, step):
        yield Block(start, min(rows, start + step), row_elements)


@dataclass(frozen=True)
class TensorGroup:
    """The same tensor in the base and in every fine-tuned model, with at least one dimension, read by rows.

    base (rows, ...) or None where the method has none; finetuned: n tensors (rows, ...). Blocks are read in fp32 on
    `device`. `is_embedding` marks an input embedding, `transposed` a matrix that is stored [in, out].
    """

    name: str
    base: Rows | None
    finetuned: tuple[Rows, ...]
    device: torch.device
    seed: int = 42
    is_embedding: bool = False
    block_elements: int = BLOCK_ELEMENTS
    transposed: bool = False

    @property
    def is_in_out(self) -> bool:
        """True for a matrix [in, out]: inputs (tokens, channels), WIDEN's columns, run along axis 0."""
        return self.is_embedding or self.transposed

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return torch.Size(self.finetuned[0].shape)

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return self.shape.numel()

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in order."""
        return cut(self.shape, self.block_elements)

    def tiles(self) -> Iterator[Block]:
        """Yield blocks whose size never changes, for sums over the whole tensor."""
        return cut(self.shape, TILE_ELEMENTS)

    def base_block(self, block: Block) -> Tensor:
        """Return the base's rows (rows, ...) in fp32."""
        assert self.base is not None
        return self._read(self.base, block)

    def model_blocks(self, block: Block) -> Tensor:
        """Return the models' rows, stacked (n, rows, ...), in fp32."""
        shape = (len(self.finetuned), block.stop - block.start, *self.shape[1:])
        stacked = torch.empty(shape, dtype=torch.float32, device=self.device)
        for i, tensor in enumerate(self.finetuned):
            stacked[i].copy_(tensor[block.rows].to(self.device))
        return stacked

    def task_vector(self, model: int, block: Block) -> Tensor:
        """Return tau_t = theta_t - theta_0 of one model for the block's rows (rows, ...), in fp32."""
        return self._read(self.finetuned[model], block) - self.base_block(block)

    def _read(self, tensor: Rows, block: Block) -> Tensor:
        """Rows in fp32; they go to a device as they are stored, and are widened there."""
        return tensor[block.rows].to(self.device).to(torch.float32)

    def at(self, block: Block, rows: Sequence[Tensor]) -> TensorGroup:
        """Return the group with one block's rows in place of the whole tensors; reading another block is an error.

        Args:
            block: the block.
            rows: its rows of the base, if the group has one, and of every model, on any device, of any float dtype.
        """
        parts = [_Part(block, tensor, self.shape) for tensor in rows]
        base = None if self.base is None else parts.pop(0)
        return replace(self, base=base, finetuned=tuple(parts))


@dataclass(frozen=True)
class _Part:
    """The rows of one block in the place of the whole tensor of `shape`."""

    block: Block
    tensor: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        assert rows == self.block.rows, f"rows {rows} of {self.block}"
        return self.tensor
