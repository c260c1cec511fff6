"""DELLA's MAGPRUNE, shared by its two methods: larger entries of a row are kept with higher probability.

Deep et al. 2024, arXiv:2406.11617.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.checkpoints.tensor_names import stacks_experts
from merging.ops.block_arguments import BlockArguments
from merging.ops.consensus import divided
from merging.ops.kernels.kernels import kernels
from merging.ops.sparse.dropping import l1_factor
from merging.ops.sparse.sparsify import keep_mask, stream_key
from merging.ops.tensor_blocks import Block, TensorGroup


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


def magprune_masks(
    group: TensorGroup, *, density: Sequence[float], epsilon: Sequence[float], rescale: str
) -> BlockArguments:
    """Return DELLA's masks of each block, (n, rows, ...) bool, and the factors that rescale the remaining entries.

    rescale: paper, 1/p of each entry; l1, mergekit's ratio of norms; none, 1. A vector is one row.
    """
    return MagpruneMasks(group, density, epsilon, rescale)


class MagpruneMasks(BlockArguments):
    """DELLA's masks and factors, by block; parameters as of `magprune_masks`."""

    def __init__(self, group: TensorGroup, density: Sequence[float], epsilon: Sequence[float], rescale: str) -> None:
        self._group, self._density, self._epsilon, self._rescale = group, density, epsilon, rescale
        self._factors = [
            l1_factor(group, i, self._mask) if rescale == "l1" and d < 1 else 1.0 for i, d in enumerate(density)
        ]

    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return masks (n, rows, ...) bool and factors, numbers or tensors (rows, ...)."""
        models = range(len(self._density))
        chances = [self._probabilities(i, block) if self._density[i] < 1 else None for i in models]
        masks = torch.stack([self._draw(i, block, p) for i, p in enumerate(chances)])
        return {"masks": masks, "factors": [self._factor(i, p) for i, p in enumerate(chances)]}

    def for_kernel(self, block: Block) -> Mapping[str, object] | None:
        """Return masks and factors computed by the compiled kernel; None where it cannot."""
        group, compiled = self._group, kernels()
        if compiled is None or group.base is None or len(group.shape) != 2:
            return None
        masks: list[Tensor | None] = []
        factors: list[float | Tensor] = []
        base = group.base[block.rows]
        for i, (density, epsilon) in enumerate(zip(self._density, self._epsilon, strict=True)):
            if density >= 1:
                masks.append(None)
                factors.append(1.0)
                continue
            key = stream_key(group.name, i, group.seed)
            result = compiled.magprune(base, group.finetuned[i][block.rows], density, epsilon, key, block.offset)
            if result is None:
                return None
            mask, chances = result
            masks.append(mask)
            factors.append(self._factor(i, chances))
        return {"masks": masks, "factors": factors}

    def _mask(self, model: int, block: Block) -> Tensor:
        return self._draw(model, block, self._probabilities(model, block))

    def _probabilities(self, model: int, block: Block) -> Tensor:
        group, density, epsilon = self._group, self._density[model], self._epsilon[model]
        if len(group.shape) == 1:
            whole = Block(0, group.shape[0], 1)
            magnitude = group.task_vector(model, whole).abs_()[None]
            return probabilities(magnitude, density, epsilon)[0, block.rows]
        magnitude = group.task_vector(model, block).abs_()
        if stacks_experts(group.name, group.shape):  # ranks within each expert's rows, as where it is stored alone
            return probabilities(magnitude.flatten(0, 1), density, epsilon).reshape(magnitude.shape)
        return probabilities(magnitude, density, epsilon)

    def _draw(self, model: int, block: Block, p: Tensor | None) -> Tensor:
        group = self._group
        shape = torch.Size((block.stop - block.start, *group.shape[1:]))
        if p is None:
            return torch.ones(shape, dtype=torch.bool, device=group.device)
        mask = keep_mask(block, shape, name=group.name, model=model, density=p, seed=group.seed)
        return mask.to(group.device)

    def _factor(self, model: int, p: Tensor | None) -> float | Tensor:
        return 1.0 / p if self._rescale == "paper" and p is not None else self._factors[model]
