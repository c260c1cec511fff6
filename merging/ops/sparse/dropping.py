"""DARE's masks, and the rescaling that Breadcrumbs and DELLA share with it. Yu et al. 2023, arXiv:2311.03099."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.ops.combination import Draw
from merging.ops.sparse.sparsify import draw_limit, keep_mask, stream_key
from merging.ops.tensor_blocks import Block, TensorGroup, row_sums


def masks_of(group: TensorGroup, parameters: Mapping[str, Any]) -> Masks:
    """Return, for each block, the models' masks (n, rows, ...) and the factors that rescale what is kept."""
    density = parameters["density"]

    def drawn(model: int, block: Block) -> Tensor:
        shape = torch.Size((block.stop - block.start, *group.shape[1:]))
        if density[model] >= 1:
            return torch.ones(shape, dtype=torch.bool)
        return keep_mask(block, shape, name=group.name, model=model, density=density[model], seed=group.seed)

    def mask(model: int, block: Block) -> Tensor:
        return drawn(model, block).to(group.device)

    def factor(model: int) -> float:
        if density[model] >= 1 or density[model] <= 0 or parameters["rescale"] == "none":
            return 1.0
        return 1.0 / density[model] if parameters["rescale"] == "paper" else l1_factor(group, model, mask)

    models = range(len(density))
    factors = [factor(i) for i in models]
    draws = [
        None if d >= 1 else Draw(stream_key(group.name, i, group.seed), draw_limit(d)) for i, d in enumerate(density)
    ]
    return Masks(mask, factors, draws, drawn if any(draws) else None)


@dataclass(frozen=True)
class Masks:
    """What is kept of each model, by block when called; `drawn` says DARE's masks without drawing them.

    on_host: gives a model's mask on the CPU, where it depends on no weight, from any thread.
    """

    mask: Callable[[int, Block], Tensor]
    factors: Sequence[float]
    drawn: Sequence[Draw | None] | None = None
    on_host: Callable[[int, Block], Tensor] | None = None

    def __call__(self, block: Block) -> dict[str, Any]:
        return self.given([self.mask(i, block) for i in range(len(self.factors))])

    def ahead(self, block: Block) -> Sequence[Tensor]:
        """Return the models' masks on the CPU before the weights are there, or nothing where they depend on them."""
        return [] if self.on_host is None else [self.on_host(i, block) for i in range(len(self.factors))]

    def given(self, masks: Sequence[Tensor]) -> dict[str, Any]:
        """Return what the method gets for a block, from its masks."""
        return {"masks": torch.stack(list(masks)), "factors": self.factors}

    def for_kernel(self, block: Block) -> tuple[Sequence[Draw | Tensor | None], Sequence[float]]:
        """Return masks and factors as a compiled kernel takes them."""
        return self.drawn or [self.mask(i, block).contiguous() for i in range(len(self.factors))], self.factors


def l1_factor(group: TensorGroup, model: int, mask: Callable[[int, Block], Tensor]) -> float:
    """Return |tau|_1 / |m * tau|_1 over the whole tensor, or 1 where either vanishes (mergekit's rescaling)."""
    before: list[float] = []
    after: list[float] = []
    for block in group.blocks():
        magnitude = group.task_vector(model, block).abs_()
        before += row_sums(magnitude)
        after += row_sums(magnitude * mask(model, block))
    whole, kept = math.fsum(before), math.fsum(after)
    return whole / kept if whole > 1e-7 and kept > 1e-7 else 1.0


def drop_and_rescale(task_vectors: Tensor, masks: Tensor, factors: Sequence[float | Tensor]) -> Tensor:
    """Return m_t * tau_t * factor_t; task_vectors and masks (n, rows, ...) -> (n, rows, ...).

    A factor is a number, or a tensor (rows, ...) with one for each entry.

    With the factor 1/density the expectation over masks is the task vector itself (DARE, equation 2).
    """
    return torch.stack([tau * mask * factor for tau, mask, factor in zip(task_vectors, masks, factors, strict=True)])
