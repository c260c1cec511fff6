"""Reinforced Agent Merging Plus, tensor-local: unique changes amplified where a model shares much. arXiv:2601.13572."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.methods.ram import changes, combine
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.tensor_blocks import TensorGroup


def tensor_statistics(group: TensorGroup, *, epsilon: float, r: float, alpha: float) -> BlockArguments:
    """Count each model's shared and unique changes over the tensor: scale 1 + r * min(shared / unique, alpha)."""
    n = len(group.finetuned)
    shared, unique = [0] * n, [0] * n
    for block in group.blocks():
        _, changed, count = changes(group.base_block(block), group.model_blocks(block), epsilon)
        for i in range(n):
            shared[i] += int((changed[i] & (count > 1)).sum())
            unique[i] += int((changed[i] & (count == 1)).sum())
    ratio = [s / max(u, epsilon) for s, u in zip(shared, unique, strict=True)]
    scales = [1 + r * min(max(x, 0.0), alpha) for x in ratio]
    return ConstantArguments(unique_scale=scales)


def ramplus_tl(base: Tensor, finetuned: Tensor, *, epsilon: float, unique_scale: Sequence[float]) -> Tensor:
    """Return the result of ram with the changes of one model alone multiplied by that model's scale.

    base (rows, ...), finetuned (n, rows, ...) -> (rows, ...).
    """
    task_vectors, changed, count = changes(base, finetuned, epsilon)
    return combine(base, task_vectors, changed, count, unique_scale)


METHOD = Method(merge_block=ramplus_tl, tensor_statistics=tensor_statistics, elementwise=True)
