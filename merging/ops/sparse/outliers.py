"""Model Breadcrumbs' mask, shared by its two methods. Davari and Belilovsky 2023, arXiv:2312.06795.

Of each task vector the largest magnitudes (outliers) and the smallest are dropped; the band between them stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.ops.magnitudes import Magnitudes
from merging.ops.selection import select, share, spread, top_thresholds
from merging.ops.sparse.dropping import Masks, l1_factor
from merging.ops.tensor_blocks import Block, TensorGroup


def band(density: float, gamma: float, elements: int) -> tuple[int, int]:
    """Return how many outliers are dropped and how many entries are kept: floor(gamma n) and floor(density n).

    Where both together exceed n, fewer outliers are dropped.
    """
    keep = share(density, elements)
    return min(share(gamma, elements), elements - keep), keep


def band_masks(group: TensorGroup, parameters: Mapping[str, Any]) -> Masks:
    """Return, for each block, which entries stay (n, rows, ...) and the factors that rescale them."""
    pairs = [band(d, g, group.elements) for d, g in zip(parameters["density"], parameters["gamma"], strict=True)]

    models, wanted = range(len(pairs)), []
    for model, (outliers, keep) in enumerate(pairs):
        magnitudes = Magnitudes(group, model)
        wanted += [(magnitudes, outliers), (magnitudes, outliers + keep)]
    found = top_thresholds(group, wanted)
    limits = [(found[2 * i] if pairs[i][0] else None, found[2 * i + 1]) for i in models]

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

    factors = [l1_factor(group, i, mask) if parameters["rescale"] == "l1" else 1.0 for i in models]
    return Masks(mask, factors)
