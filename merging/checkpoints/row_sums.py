"""Sums along the rows of a tensor that depend neither on threads nor on the block that the rows are read in."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1024
"""Length of the pieces in which a long row is added up."""


def row_sums(x: Tensor) -> list[float]:
    """Return the sum of each row of x (rows, ...) in fp64, the same whatever the other rows are.

    Their exactly rounded total (math.fsum) then depends on no block size and no number of threads: a long row is added
    up in pieces of fixed length, since a full reduction would be split by threads.
    """
    return last_sums(x[:, None].flatten(1).double()).tolist()


def last_sums(x: Tensor) -> Tensor:
    """Return the sums along the last axis of x (..., n), in its dtype, each the same whatever the other rows are.

    A single row would be split by threads where it is long; here it is added up in pieces of fixed length.
    """
    if x.shape[-1] > PIECE:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE)).sum(-1)
    return x.sum(-1)
