"""The row that stands where no model has one: padding of the vocabulary up to a round number of rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from merging.ops.tensor_blocks import TILE_ELEMENTS, cut
from merging.plan.types import Source


@lru_cache(maxsize=64)
def mean_row(source: Source) -> Tensor:
    """Return the mean over the rows of a stored tensor, fp32 of its row's shape, added up in fp64 over fixed tiles.

    As a row of the output head its logit is the mean of all the others', so that such an id is never the likeliest; a
    row of zeros could be.
    """
    rows = source.checkpoint.rows(source.name)
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for tile in cut(rows.shape, TILE_ELEMENTS):
        total += rows[tile.rows].double().sum(0)
    return (total / max(1, rows.shape[0])).float()
