"""DELLA's MAGPRUNE, shared by its two methods: the larger an entry of its row, the likelier it is kept.

Deep et al. 2024, arXiv:2406.11617.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.tensor_names import stacks_experts
from merging.ops.consensus import divided
from merging.ops.kernels.kernels import kernels
from merging.ops.sparse.dropping import l1_factor
from merging.ops.sparse.sparsify import keep_mask, stream_key
from merging.ops.tensor_blocks import Block, PerBlock, TensorGroup


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
    return density - epsilon + 2 * epsilon * divided(rank, d - 1)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Repeat values (d,) along axis 1 of a tensor (rows, d, ...)."""
    return values.reshape(1, -1, *[1] * (like.dim() - 2)).expand_as(like)


def magprune_masks(group: TensorGroup, parameters: Mapping[str, Any]) -> Kept:
    """Return, for each block, which entries stay (n, rows, ...) and the factors that rescale them.

    rescale: paper, 1/p of each entry; l1, mergekit's ratio of norms; none. A vector is one row.
    """
    densities, epsilons = parameters["density"], parameters["epsilon"]
    whole = Block(0, group.shape[0], 1)

    def chance(model: int, block: Block) -> Tensor:
        if len(group.shape) == 1:
            magnitude = group.task_vector(model, whole).abs_()[None]
            return probabilities(magnitude, densities[model], epsilons[model])[0, block.rows]
        magnitude = group.task_vector(model, block).abs_()
        if stacks_experts(group.name, group.shape):  # each expert's rows for themselves, as where it is stored alone
            rows = magnitude.flatten(0, 1)
            return probabilities(rows, densities[model], epsilons[model]).reshape(magnitude.shape)
        return probabilities(magnitude, densities[model], epsilons[model])

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

    def factor(model: int, p: Tensor | None) -> float | Tensor:
        return 1.0 / p if rescale == "paper" and p is not None else fixed[model]

    def per_block(block: Block) -> dict[str, Any]:
        chances = [chance(i, block) if dropping[i] else None for i in models]
        masks = torch.stack([draw(i, block, p) for i, p in enumerate(chances)])
        return {"masks": masks, "factors": [factor(i, p) for i, p in enumerate(chances)]}

    def for_kernel(block: Block) -> tuple[list[Tensor | None], list[float | Tensor]] | None:
        compiled = kernels()
        if compiled is None or group.base is None or len(group.shape) != 2:
            return None
        masks: list[Tensor | None] = []
        factors: list[float | Tensor] = []
        base = group.base[block.rows]
        for i in models:
            if not dropping[i]:
                masks.append(None)
                factors.append(1.0)
                continue
            key = stream_key(group.name, i, group.seed)
            rows = group.finetuned[i][block.rows]
            found = compiled.magprune(base, rows, densities[i], epsilons[i], key, block.offset)
            if found is None:
                return None
            masks.append(found[0])
            factors.append(factor(i, found[1]))
        return masks, factors

    return Kept(per_block, for_kernel)


@dataclass(frozen=True)
class Kept:
    """What DELLA keeps of each model in a block when called; `for_kernel` finds it by the compiled kernel, or None."""

    per_block: PerBlock
    for_kernel: Callable[[Block], tuple[list[Tensor | None], list[float | Tensor]] | None]

    def __call__(self, block: Block) -> Mapping[str, Any]:
        return self.per_block(block)
