"""Model Stock: interpolation between base and mean by the angle between the models.

Jang et al. 2024, arXiv:2403.19522.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments, ConstantArguments
from merging.ops.consensus import add_to
from merging.ops.gram import gram
from merging.ops.tensor_blocks import Block, TensorGroup


def tensor_statistics(group: TensorGroup, *, filter_wise: bool) -> BlockArguments:
    """Compute t from the mean cosine between task vectors: of the whole tensor, or of each row (`filter_wise`)."""
    n = len(group.finetuned)
    if not filter_wise or len(group.shape) == 1:
        whole = interpolation(gram(group, relative=True)[None], n)
        return ConstantArguments(t=whole.float().to(group.device))

    def rows(block: Block) -> dict[str, object]:
        tau = (group.model_blocks(block) - group.base_block(block)).double()
        products = torch.einsum("i...d,j...d->...ij", tau, tau)
        return {"t": interpolation(products, n).float()[..., None]}

    return ArgumentsByBlock(rows)


def interpolation(products: Tensor, n: int) -> Tensor:
    """Return t = n c / (1 + (n - 1) c), c the mean pairwise cosine; (..., n, n) -> (...); 0 at its singularity."""
    length = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    pairs = list(itertools.combinations(range(n), 2))
    cosines = [products[..., i, j] / (length[..., i] * length[..., j]).clamp(min=1e-6) for i, j in pairs]
    c = torch.stack([x.clamp(-1, 1) for x in cosines]).mean(0)
    below = 1 + (n - 1) * c
    return torch.where(below.abs() < 1e-6, torch.zeros_like(c), n * c / torch.where(below == 0, 1.0, below))


def model_stock(base: Tensor, finetuned: Tensor, *, t: Tensor) -> Tensor:
    """Return theta_0 + t * mean_i(theta_i - theta_0), t = n cos / (1 + (n - 1) cos).

    base (rows, ...), finetuned (n, rows, ...), t broadcastable -> (rows, ...).
    """
    return add_to(base, (finetuned - base).mean(0) * t)


METHOD = Method(merge_block=model_stock, tensor_statistics=tensor_statistics)
