"""Rows of adapted tensors: computed in fp64 block by block, rounded once to fp32."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.checkpoints.storage import Rows

BLOCK_ELEMENTS = 1 << 20
"""Elements per fp64 block. No result depends on it."""
NORM_ROWS = 256
"""Rows per step of a column norm; fixed, since the result depends on the order of summation."""


@dataclass(frozen=True)
class AdaptedRows(ABC):
    """Base class: rows of `base` changed by `wide_rows`, rounded once to fp32."""

    base: Rows

    @property
    def shape(self) -> torch.Size:
        """The base tensor's shape."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """fp32, whatever the dtype of the base."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows start:stop, rounded once to fp32."""
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty(max(0, stop - start), *self.shape[1:])
        step = max(1, BLOCK_ELEMENTS // max(1, self.shape[1:].numel()))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            out[first - start : last - start] = self.wide_rows(first, last)
        return out

    @abstractmethod
    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop in fp64."""


@dataclass(frozen=True)
class LowRankRows(AdaptedRows):
    """theta_0 + scaling * left_factor @ right_factor: left_factor (rows, r), right_factor (r, columns).

    The product is summed rank by rank in fp64, where products of two fp32 numbers are exact: no element depends on
    neighboring rows, threads or block sizes.
    """

    left_factor: Tensor
    right_factor: Tensor
    scaling: float

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop in fp64."""
        return low_rank(self.left_factor[start:stop], self.right_factor, self.scaling).add_(self.base[start:stop])


@dataclass(frozen=True)
class ExpertRows(AdaptedRows):
    """Stacked experts (experts, s1, s2): theta_0[e] + scaling * left_factor[e] @ right_factor[e]."""

    left_factor: Tensor
    """(experts, s1, r)"""
    right_factor: Tensor
    """(experts, r, s2)"""
    scaling: float

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return experts start:stop in fp64."""
        import torch

        deltas = [low_rank(self.left_factor[e], self.right_factor[e], self.scaling) for e in range(start, stop)]
        return torch.stack(deltas).add_(self.base[start:stop])


@dataclass(frozen=True)
class DoraRows(AdaptedRows):
    """m * V / ||V||, V = theta_0 + scaling * B A, the norm over the inputs of each output channel.

    Liu et al. 2024, arXiv:2402.09353, equation 5. magnitude: (outputs,); by_column: outputs are along axis 1 (matrices
    stored (in, out), embeddings).
    """

    changed: LowRankRows
    magnitude: Tensor
    by_column: bool
    _norms: list[Tensor] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop in fp64."""
        from merging.checkpoints.row_sums import last_sums  # loads torch

        rows = self.changed.wide_rows(start, stop)
        magnitude = self.magnitude.double()
        if self.by_column:
            return rows * (magnitude / self._column_norms())
        return rows * (magnitude[start:stop] / last_sums(rows.square()).sqrt())[:, None]

    def _column_norms(self) -> Tensor:
        """Return the norm of each column over all rows, computed once."""
        import torch

        with self._lock:
            if not self._norms:
                starts = range(0, self.shape[0], NORM_ROWS)
                blocks = (self.changed.wide_rows(i, min(self.shape[0], i + NORM_ROWS)) for i in starts)
                total = torch.zeros(self.shape[1], dtype=torch.float64)
                for block in blocks:
                    total += block.square().sum(0)
                self._norms.append(total.sqrt())
            return self._norms[0]


@dataclass(frozen=True)
class BiasRows(AdaptedRows):
    """bias_0 + scaling * bias: the bias of a LoRA B (lora_bias)."""

    bias: Tensor
    scaling: float

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return entries start:stop in fp64."""
        return self.bias[start:stop].double().mul_(self.scaling).add_(self.base[start:stop])


@dataclass(frozen=True)
class TokenRows(AdaptedRows):
    """An embedding with some rows replaced (trainable_token_indices); replaced: {row: index in `rows`}."""

    rows: Tensor
    replaced: dict[int, int]

    def wide_rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop in fp64."""
        block = self.base[start:stop].double()
        for row, index in self.replaced.items():
            if start <= row < stop:
                block[row - start] = self.rows[index].double()
        return block


def low_rank(left_factor: Tensor, right_factor: Tensor, scaling: float) -> Tensor:
    """Return scaling * left_factor @ right_factor in fp64, summed rank by rank.

    Args:
        left_factor: (rows, r).
        right_factor: (r, columns).
        scaling: Factor of the product.
    """
    import torch

    left_factor, right_factor = left_factor.double(), right_factor.double()
    total = torch.zeros(len(left_factor), right_factor.shape[1], dtype=torch.float64)
    for rank in range(len(right_factor)):
        total.addr_(left_factor[:, rank], right_factor[rank])
    return total.mul_(scaling)
