"""Arcee Fusion: take one model's entries of exceptional importance, the base's elsewhere. As in mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merging.checkpoints.row_sums import last_sums
from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments
from merging.ops.selection import top_thresholds
from merging.ops.tensor_blocks import Block, TensorGroup

EPS = 1e-8


def tensor_statistics(group: TensorGroup) -> BlockArguments:
    """Mark entries whose importance |tau| * KL(softmax(row) || softmax(base row)) is at least median + 1.5 IQR.

    The quantiles are exact; mergekit samples a million entries of larger tensors. Computed on the CPU for every device:
    the last bit of a logarithm decides on entries at the limit.
    """
    device, group = group.device, replace(group, device=torch.device("cpu"))
    whole = Block(0, group.shape[0], 1)
    vector = _importance(group.base_block(whole), group.model_blocks(whole)[0]) if len(group.shape) == 1 else None

    def importance(block: Block) -> Tensor:
        if vector is not None:  # the softmax of a vector runs over all of it
            return vector[block.rows]
        return _importance(group.base_block(block), group.model_blocks(block)[0])

    larger_or_equal = [group.elements - int(q * (group.elements - 1)) for q in (0.25, 0.5, 0.75)]
    thresholds = top_thresholds(group, [(importance, keep) for keep in larger_or_equal])
    low, median, high = (
        threshold.value if threshold else min(float(importance(block).min()) for block in group.blocks())
        for threshold in thresholds
    )
    limit = torch.tensor(median, dtype=torch.float32) + 1.5 * (torch.tensor(high) - torch.tensor(low)).float()
    return HostMask(lambda block: importance(block) >= limit, device)


class HostMask(BlockArguments):
    """A mask that is computed on the CPU, by the threads that read."""

    def __init__(self, mask: Callable[[Block], Tensor], device: torch.device) -> None:
        self._mask, self._device = mask, device

    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return the mask (rows, ...) bool on the computing device."""
        return {"mask": self._mask(block).to(self._device)}

    def on_host(self, block: Block) -> Sequence[Tensor]:
        """Return the mask (rows, ...) bool on the CPU."""
        return [self._mask(block)]

    def from_host(self, block: Block, tensors: Sequence[Tensor]) -> Mapping[str, object]:
        """Return the mask (rows, ...) bool, on the computing device by now."""
        return {"mask": tensors[0]}


def _importance(base: Tensor, model: Tensor) -> Tensor:
    p, q = torch.softmax(model, dim=-1) + EPS, torch.softmax(base, dim=-1) + EPS
    divergence = last_sums(p * torch.log(p / q)).unsqueeze(-1)
    return (model - base).abs() * divergence.clamp(min=0)


def arcee_fusion(base: Tensor, finetuned: Tensor, *, mask: Tensor) -> Tensor:
    """Return theta_1 where the mask is set, theta_0 elsewhere.

    base and mask (rows, ...), finetuned (1, rows, ...) -> (rows, ...).
    """
    return torch.where(mask, finetuned[0], base)


METHOD = Method(merge_block=arcee_fusion, tensor_statistics=tensor_statistics)
