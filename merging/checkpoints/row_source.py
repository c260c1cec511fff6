"""A tensor that is read block of rows by block of rows, so that none need be whole in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Rows(Protocol):
    """What the loop needs of a stored or computed tensor; a torch.Tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is read."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows start:stop."""
