"""Model Breadcrumbs' mask, shared by its two methods. Davari and Belilovsky 2023, arXiv:2312.06795.

Of each task vector the largest magnitudes (outliers) and the smallest are dropped; the band between them stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.ops.block_arguments import BlockArguments
from merging.ops.selection import Magnitudes, Values, select, share, spread, top_thresholds
from merging.ops.sparse.dropping import Masks, l1_factor
from merging.ops.tensor_blocks import Block, TensorGroup


def band(density: float, gamma: float, elements: int) -> tuple[int, int]:
    """Return the number of outliers that are dropped and of entries that are kept: floor(gamma n), floor(density n).

    Where both together exceed n, fewer outliers are dropped.
    """
    keep = share(density, elements)
    return min(share(gamma, elements), elements - keep), keep


def band_masks(group: TensorGroup, *, density: Sequence[float], gamma: Sequence[float], rescale: str) -> BlockArguments:
    """Return the masks of each block, (n, rows, ...) bool, and the factors that rescale the remaining entries."""
    pairs = [band(d, g, group.elements) for d, g in zip(density, gamma, strict=True)]
    requests: list[tuple[Values, int]] = []
    for model, (outliers, keep) in enumerate(pairs):
        magnitudes = Magnitudes(group, model)
        requests += [(magnitudes, outliers), (magnitudes, outliers + keep)]
    thresholds = top_thresholds(group, requests)
    limits = [(thresholds[2 * i] if outliers else None, thresholds[2 * i + 1]) for i, (outliers, _) in enumerate(pairs)]

    def mask(model: int, block: Block) -> Tensor:
        values = Magnitudes(group, model)(block)
        upper, lower = limits[model]
        keep = pairs[model][1]
        if keep == 0:
            return torch.zeros_like(values, dtype=torch.bool)
        if upper is None:
            return select(values, lower, block)
        if lower is not None and upper.value == lower.value:  # the whole band is of one magnitude
            return spread(values == lower.value, lower.equal_before[block.start], keep, lower.equal)
        return select(values, lower, block) & ~select(values, upper, block)

    factors = [l1_factor(group, i, mask) if rescale == "l1" else 1.0 for i in range(len(pairs))]
    return Masks(mask, factors)
