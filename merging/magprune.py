"""DELLA's MAGPRUNE, shared by its two methods: the larger an entry of its row, the likelier it is kept.

Deep et al. 2024, arXiv:2406.11617.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.dropping import l1_factor
from merging.sparsify import keep_mask
from merging.tensors import Block, PerBlock, TensorGroup


def probabilities(magnitude: Tensor, density: float, epsilon: float) -> Tensor:
    """Return p = density - epsilon + 2 epsilon * rank / (d - 1) for the rank 0..d-1 of each entry along axis 1.

    magnitude (rows, d, ...) -> the same shape; equal magnitudes rank in index order, and a row of one
    entry has p = density.
    """
    d = magnitude.shape[1]
    if d == 1:
        return torch.full_like(magnitude, density)
    order = torch.argsort(magnitude, dim=1, stable=True)
    ascending = torch.arange(d, dtype=magnitude.dtype, device=magnitude.device)
    rank = torch.empty_like(magnitude).scatter_(1, order, _along(ascending, magnitude))
    return density - epsilon + 2 * epsilon * (rank / (d - 1))


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Repeat values (d,) along axis 1 of a tensor (rows, d, ...)."""
    return values.reshape(1, -1, *[1] * (like.dim() - 2)).expand_as(like)


def magprune_masks(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Return, for each block, which entries stay (n, rows, ...) and the factors that rescale them.

    rescale: paper, 1/p of each entry; l1, mergekit's ratio of norms; none. A vector is one row.
    """
    densities, epsilons = parameters["density"], parameters["epsilon"]
    whole = Block(0, group.shape[0], 1)

    def chance(model: int, block: Block) -> Tensor:
        if len(group.shape) == 1:
            magnitude = group.task_vector(model, whole).abs_()[None]
            return probabilities(magnitude, densities[model], epsilons[model])[0, block.rows]
        return probabilities(group.task_vector(model, block).abs_(), densities[model], epsilons[model])

    def draw(model: int, block: Block, p: Tensor | None) -> Tensor:
        shape = torch.Size((block.stop - block.start, *group.shape[1:]))
        if p is None:
            return torch.ones(shape, dtype=torch.bool, device=group.device)
        drawn = keep_mask(block, shape, name=group.name, model=model, density=p, seed=group.seed)
        return drawn.to(group.device)

    rescale = parameters["rescale"]
    models = range(len(densities))
    dropping = [density < 1 for density in densities]
    fixed = [
        l1_factor(group, i, lambda model, block: draw(model, block, chance(model, block)))
        if rescale == "l1" and dropping[i]
        else 1.0
        for i in models
    ]

    def per_block(block: Block) -> dict[str, Any]:
        chances = [chance(i, block) if dropping[i] else None for i in models]
        return {
            "masks": torch.stack([draw(i, block, chances[i]) for i in models]),
            "factors": [1.0 / p if rescale == "paper" and p is not None else fixed[i] for i, p in enumerate(chances)],
        }

    return per_block
