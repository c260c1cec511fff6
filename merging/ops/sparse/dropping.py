"""DARE's masks, and the rescaling that Breadcrumbs and DELLA share with it. Yu et al. 2023, arXiv:2311.03099."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from merging.checkpoints.row_sums import row_sums
from merging.ops.block_arguments import BlockArguments
from merging.ops.kernel_spec import RandomMask
from merging.ops.sparse.sparsify import keep_mask, mask_limit, stream_key
from merging.ops.tensor_blocks import Block, TensorGroup

Mask = Callable[[int, Block], Tensor]
"""Returns the mask (rows, ...) bool of one model for a block."""


def random_masks(group: TensorGroup, *, density: Sequence[float], rescale: str) -> BlockArguments:
    """Return DARE's masks of each block, (n, rows, ...) bool, and the factors that rescale the remaining entries.

    An entry of model t is kept with probability density_t. rescale: paper, 1 / density_t; l1, the ratio of l1 norms;
    none, 1.
    """

    def host_mask(model: int, block: Block) -> Tensor:
        shape = torch.Size((block.stop - block.start, *group.shape[1:]))
        if density[model] >= 1:
            return torch.ones(shape, dtype=torch.bool)
        return keep_mask(block, shape, name=group.name, model=model, density=density[model], seed=group.seed)

    def mask(model: int, block: Block) -> Tensor:
        return host_mask(model, block).to(group.device)

    def factor(model: int) -> float:
        if density[model] >= 1 or density[model] <= 0 or rescale == "none":
            return 1.0
        return 1.0 / density[model] if rescale == "paper" else l1_factor(group, model, mask)

    factors = [factor(i) for i in range(len(density))]
    random = [
        None if d >= 1 else RandomMask(stream_key(group.name, i, group.seed), mask_limit(d))
        for i, d in enumerate(density)
    ]
    return Masks(mask, factors, random, host_mask if any(random) else None)


class Masks(BlockArguments):
    """Masks and factors of a sparse method, by block.

    Args:
        mask: of one model, on the computing device.
        factors: of each model.
        for_kernels: the masks as data, where a kernel can compute them; None: it gets them as tensors.
        host_mask: of one model, on the CPU, where it depends on no weight; from any thread.
    """

    def __init__(
        self,
        mask: Mask,
        factors: Sequence[float],
        for_kernels: Sequence[RandomMask | None] | None = None,
        host_mask: Mask | None = None,
    ) -> None:
        self._mask, self._factors, self._for_kernels, self._host_mask = mask, factors, for_kernels, host_mask

    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return masks (n, rows, ...) bool and factors."""
        return self._stacked([self._mask(i, block) for i in range(len(self._factors))])

    def on_host(self, block: Block) -> Sequence[Tensor]:
        """Return the models' masks on the CPU; nothing where they depend on the weights."""
        return [] if self._host_mask is None else [self._host_mask(i, block) for i in range(len(self._factors))]

    def from_host(self, block: Block, tensors: Sequence[Tensor]) -> Mapping[str, object]:
        """Return masks (n, rows, ...) bool and factors, from the models' masks where `on_host` returns them."""
        return self.for_block(block) if self._host_mask is None else self._stacked(tensors)

    def _stacked(self, masks: Sequence[Tensor]) -> Mapping[str, object]:
        return {"masks": torch.stack(list(masks)), "factors": self._factors}

    def for_kernel(self, block: Block) -> Mapping[str, object]:
        """Return masks as data or as contiguous tensors, and factors."""
        if self._for_kernels is not None:
            return {"masks": self._for_kernels, "factors": self._factors}
        masks = [self._mask(i, block).contiguous() for i in range(len(self._factors))]
        return {"masks": masks, "factors": self._factors}


def l1_factor(group: TensorGroup, model: int, mask: Mask) -> float:
    """Return |tau|_1 / |m * tau|_1 over the whole tensor, or 1 where either vanishes (mergekit's rescaling)."""
    before: list[float] = []
    after: list[float] = []
    for block in group.blocks():
        magnitude = group.task_vector(model, block).abs_()
        before += row_sums(magnitude)
        after += row_sums(magnitude * mask(model, block))
    norm, masked_norm = math.fsum(before), math.fsum(after)
    return norm / masked_norm if norm > 1e-7 and masked_norm > 1e-7 else 1.0
