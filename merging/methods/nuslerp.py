"""NuSLERP: the arc between two models, or with a base between their task vectors. As in mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments, ConstantArguments
from merging.ops.consensus import add_to
from merging.ops.gram import gram
from merging.ops.tensor_blocks import Block, TensorGroup


def tensor_statistics(
    group: TensorGroup, *, weights: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> BlockArguments:
    """Compute the pair's coefficients: one for the tensor (nuslerp_flatten), or one for each row or column.

    t = w_2 / (w_1 + w_2), one half where the weights cancel. Without flattening, each vector along the last axis has an
    angle of its own; with nuslerp_row_wise each vector along the first axis.
    """
    t = arc_position(weights)
    relative = group.base is not None

    def pair(block: Block) -> Tensor:
        models = group.model_blocks(block)
        return (models - group.base_block(block) if relative else models).double()

    if nuslerp_flatten or len(group.shape) == 1:
        g = gram(group, relative)
        whole = arc(g[0, 0], g[1, 1], g[0, 1], t).to(group.device)
        return ConstantArguments(coefficients=whole)
    if not nuslerp_row_wise:

        def rows(block: Block) -> dict[str, object]:
            x, y = pair(block)
            xx, yy, xy = ((a * b).sum(-1, keepdim=True) for a, b in ((x, x), (y, y), (x, y)))
            return {"coefficients": arc(xx, yy, xy, t)}

        return ArgumentsByBlock(rows)
    sums = torch.zeros(3, *group.shape[1:], dtype=torch.float64, device=group.device)
    for tile in group.tiles():
        x, y = pair(tile)
        sums += torch.stack([(x * x).sum(0), (y * y).sum(0), (x * y).sum(0)])
    columns = arc(sums[0], sums[1], sums[2], t)
    return ConstantArguments(coefficients=columns)


def arc_position(weights: Sequence[float]) -> float:
    """Return the position on the arc from the first model to the second, in [0, 1] for weights of one sign."""
    first, second = weights
    return second / (first + second) if abs(first + second) >= 1e-6 else 0.5


def arc(xx: Tensor, yy: Tensor, xy: Tensor, t: float) -> Tensor:
    """Return coefficients (2, ...) fp32 from squared norms and inner product; a line where the pair is collinear."""
    cosine = (xy / (xx.sqrt().clamp(min=1e-7) * yy.sqrt().clamp(min=1e-7))).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-16
    theta = torch.acos(torch.where(straight, 0.0, cosine))
    a, b = torch.sin((1 - t) * theta) / torch.sin(theta), torch.sin(t * theta) / torch.sin(theta)
    return torch.stack([torch.where(straight, 1 - t, a), torch.where(straight, t, b)]).float()


def nuslerp(base: Tensor | None, finetuned: Tensor, *, coefficients: Tensor) -> Tensor:
    """Return [theta_0 +] a x_1 + b x_2, x_t the models' tensors, or with a base their task vectors.

    base (rows, ...) or None, finetuned (2, rows, ...), coefficients (2, broadcastable) -> (rows, ...).
    """
    x, y = finetuned if base is None else finetuned - base
    merged = x * coefficients[0] + y * coefficients[1]
    return merged if base is None else add_to(base, merged)


METHOD = Method(merge_block=nuslerp, tensor_statistics=tensor_statistics)
