"""Arcee Fusion: take over one model's entries of exceptional importance. As in mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging.ops.selection import top_thresholds
from merging.ops.tensor_blocks import Block, PerBlock, TensorGroup, last_sums
from merging.recipe.method_registry import merge_method

EPS = 1e-8


def fused_entries_of(group: TensorGroup, parameters: Mapping[str, Any]) -> PerBlock:
    """Mark entries whose importance |tau| * KL(softmax(row) || softmax(base row)) is at least median + 1.5 IQR.

    The quantiles are exact; mergekit samples a million entries of larger tensors. On the CPU whatever the device: the
    last bit of a logarithm decides on entries at the limit.
    """
    device, group = group.device, replace(group, device=torch.device("cpu"))
    whole = Block(0, group.shape[0], 1)
    vector = _importance(group.base_block(whole), group.model_blocks(whole)[0]) if len(group.shape) == 1 else None

    def importance(block: Block) -> Tensor:
        if vector is not None:  # the softmax of a vector runs over all of it
            return vector[block.rows]
        return _importance(group.base_block(block), group.model_blocks(block)[0])

    larger_or_equal = [group.elements - int(q * (group.elements - 1)) for q in (0.25, 0.5, 0.75)]
    quantiles = top_thresholds(group, [(importance, keep) for keep in larger_or_equal])
    low, median, high = (
        found.value if found else min(float(importance(block).min()) for block in group.blocks()) for found in quantiles
    )
    limit = torch.tensor(median, dtype=torch.float32) + 1.5 * (torch.tensor(high) - torch.tensor(low)).float()
    return Fused(lambda block: importance(block) >= limit, device)


@dataclass(frozen=True)
class Fused:
    """Which entries of a block are taken over; `ahead` and `given` let them be found by the threads that read."""

    on_host: Callable[[Block], Tensor]
    device: torch.device

    def __call__(self, block: Block) -> dict[str, Any]:
        return self.given([self.on_host(block).to(self.device)])

    def ahead(self, block: Block) -> Sequence[Tensor]:
        """Return the mask (rows, ...) bool on the CPU."""
        return [self.on_host(block)]

    def given(self, masks: Sequence[Tensor]) -> dict[str, Any]:
        """Return what the method gets for a block, from its mask."""
        return {"fused": masks[0]}


def _importance(base: Tensor, model: Tensor) -> Tensor:
    p, q = torch.softmax(model, dim=-1) + EPS, torch.softmax(base, dim=-1) + EPS
    divergence = last_sums(p * torch.log(p / q)).unsqueeze(-1)
    return (model - base).abs() * divergence.clamp(min=0)


def arcee_fusion(base: Tensor, finetuned: Tensor, *, fused: Tensor) -> Tensor:
    """theta = theta_1 where fused, theta_0 elsewhere; base (rows, ...), finetuned (1, rows, ...) -> (rows, ...)."""
    return torch.where(fused, finetuned[0], base)


METHOD = merge_method(prepare=fused_entries_of)(arcee_fusion)
