"""WIDEN: merging by weight disentanglement. Yu et al. 2024, arXiv:2408.03092.

A weight matrix is split into column magnitudes and directions. Their differences from the base rank the columns of a
model; ranks compete across models by softmax; columns ranked above average get a calibrated score instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from common.threads import in_order
from merging.methods.contract import Method
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments, ConstantArguments
from merging.ops.consensus import add_to
from merging.ops.kernel_spec import ColumnWeights
from merging.ops.kernels.kernels import Kernels, kernels
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.ops.whole_matrix import is_stack

COLUMN_MULTIPLE = 64
"""The kernel sums multiples of so many columns: torch adds the columns beyond in another order."""


def tensor_statistics(
    group: TensorGroup, *, above_average_value_ratio: float, score_calibration_value: float
) -> BlockArguments:
    """Compute the coefficient of each column (or, for vectors, each entry) of each model from the whole tensor.

    Computed on the CPU for every device: the last bit of a sum decides between ranks that are nearly equal.
    """
    device, group = group.device, replace(group, device=torch.device("cpu"))
    ratio, calibration = above_average_value_ratio, score_calibration_value
    if len(group.shape) == 1:
        significance = torch.stack([_task_vector(group, i).abs().double() for i in range(len(group.finetuned))])
        above = significance > ratio * significance.mean(1, keepdim=True)
        coefficients = _score(significance, above, calibration).to(device)
        return ArgumentsByBlock(lambda block: {"coefficients": coefficients[:, block.rows]})
    scores = []
    for difference in _column_differences(group):
        position, columns = _positions(difference), difference.shape[-1]
        # rank > ratio * mean(rank), in whole numbers: the mean of 0..d-1 is (d - 1) / 2
        scores.append(_score(position / columns, position > ratio * (columns - 1) / 2, calibration))
    coefficients = ((scores[0] + scores[1]) / 2).to(device)
    if is_stack(group):
        return ArgumentsByBlock(lambda block: {"coefficients": coefficients[:, block.rows, None, :]})
    if group.is_in_out:
        return ArgumentsByBlock(lambda block: {"coefficients": coefficients[:, block.rows, None]})
    return ConstantArguments(coefficients=coefficients.reshape(len(coefficients), 1, *group.shape[1:]))


def widen(base: Tensor, finetuned: Tensor, *, coefficients: Tensor) -> Tensor:
    """Return theta_0 + sum_t c_t * tau_t, with a coefficient per model and column.

    base (rows, ...), finetuned (n, rows, ...), coefficients broadcastable to finetuned -> (rows, ...).
    """
    total = torch.zeros_like(base)
    for tensor, coefficient in zip(finetuned, coefficients, strict=True):
        total += (tensor - base) * coefficient
    return add_to(base, total)


def _score(rank: Tensor, above: Tensor, calibration: float) -> Tensor:
    """Softmax over the models of their ranks; the calibration value where a rank is above average; (n, d) fp32."""
    competing = torch.softmax(rank, dim=0)
    return torch.where(above, torch.full_like(competing, calibration), competing).float()


def _positions(difference: Tensor) -> Tensor:
    """Position of each column in the ascending order of its model (and expert), equal ones in index order; fp64."""
    order = torch.argsort(difference, dim=-1, stable=True)
    position = torch.empty_like(difference)
    ascending = torch.arange(difference.shape[-1], dtype=difference.dtype, device=difference.device)
    return position.scatter_(-1, order, ascending.expand_as(difference))


def _task_vector(group: TensorGroup, model: int) -> Tensor:
    return group.task_vector(model, Block(0, group.shape[0], 1))


def _column_differences(group: TensorGroup) -> tuple[Tensor, Tensor]:
    """Return |m_t - m_0| and 1 - cos(W_t, W_0) per column, (n, d) fp64; (n, experts, d) for a stack of experts.

    A column is an input channel: axis 1, or the rows of a matrix [in, out]. Each expert of a stack is a matrix
    of its own. A convolution is the matrix [out, in * kernel] that it applies to a window. A column of zeros has no
    direction: its difference is NaN, which ranks highest, as in the published code. Sums are taken in fp64 over tiles
    of a fixed size, so that no rank depends on block size or threads.
    """
    stack = is_stack(group)
    shape = (
        (group.shape[0], group.shape[-1])
        if stack
        else group.shape[:1]
        if group.is_in_out
        else (group.elements // group.shape[0],)
    )
    n, axis = len(group.finetuned), -1 if group.is_in_out else -2
    sums = {key: torch.zeros(n, *shape, dtype=torch.float64) for key in ("models", "base", "product")}
    can_use_kernel = not stack and not group.is_in_out and shape[0] % COLUMN_MULTIPLE == 0
    compiled = kernels() if can_use_kernel and _same_order() else None
    for_torch: Iterable[Block] = group.tiles()
    if compiled is not None:
        for_torch = _add_by_kernel(compiled, group, sums)
    for tile in for_torch:
        base, models = group.base_block(tile).double(), group.model_blocks(tile).double()
        if not stack:
            base, models = base.flatten(1), models.flatten(2)
        where = tile.rows if stack or group.is_in_out else slice(None)
        sums["models"][:, where] += models.square().sum(axis)
        sums["base"][:, where] += base.square().sum(axis)
        sums["product"][:, where] += (models * base).sum(axis)
    model_norm, base_norm = sums["models"].sqrt(), sums["base"].sqrt()
    cosine = sums["product"] / (model_norm * base_norm)
    return (model_norm - base_norm).abs(), 1 - cosine


@cache
def _same_order() -> bool:
    """Return True if the kernel adds rows in the order of this torch, whose sums decide on equal ranks."""
    compiled = kernels()
    if compiled is None:
        return False
    x = torch.randn(3, 200, COLUMN_MULTIPLE, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(5, COLUMN_MULTIPLE, dtype=torch.float64)
    compiled.squares(x[0], [x[1], x[2]], sums)
    base, models = x[0].double(), x[1:].double()
    expected = [models.square().sum(-2), base.square().sum(-2)[None], (models * base).sum(-2)]
    return torch.equal(sums, torch.cat(expected))


def _add_by_kernel(compiled: Kernels, group: TensorGroup, sums: Mapping[str, Tensor]) -> Iterator[Block]:
    """Add the tiles to the sums, several at a time and in their order; yields those that torch must add."""
    n, (columns,) = len(group.finetuned), sums["base"].shape[1:]

    def sum_tile(tile: Block) -> tuple[Block, Tensor | None]:
        assert group.base is not None
        tile_sums = torch.zeros(2 * n + 1, columns, dtype=torch.float64)
        models = [tensor[tile.rows] for tensor in group.finetuned]
        return tile, tile_sums if compiled.squares(group.base[tile.rows], models, tile_sums) else None

    for tile, tile_sums in in_order(sum_tile, group.tiles(), lookahead=4):
        if tile_sums is None:
            yield tile
            continue
        sums["models"] += tile_sums[:n]
        sums["base"] += tile_sums[n]
        sums["product"] += tile_sums[n + 1 :]


def reference(
    base: Tensor,
    finetuned: Sequence[Tensor],
    *,
    above_average_value_ratio: float,
    score_calibration_value: float,
    is_in_out: bool,
) -> Tensor:
    """Return the published code's result on whole tensors in their own dtype (bf16): norms, ranks and scores alike."""
    ratio, calibration = above_average_value_ratio, score_calibration_value

    def score(values: Tensor) -> Tensor:
        above = values > values.mean(dim=1, keepdim=True) * ratio
        competing = torch.softmax(values, dim=0)
        competing[above] = calibration
        return competing

    def ranks(difference: Tensor) -> Tensor:
        order = torch.argsort(difference, dim=1, descending=False, stable=True)
        ascending = torch.arange(difference.shape[1], device=difference.device).expand_as(difference)
        ranks = torch.zeros_like(difference, dtype=torch.float32)
        return ranks.scatter_(1, order, (ascending / difference.shape[1]).float())

    if base.dim() == 1:
        task_vectors = torch.stack([tensor - base for tensor in finetuned])
        merged = base + (task_vectors * score(task_vectors.abs())).sum(dim=0)
        return merged.to(base.dtype)
    theta_0 = base.T if is_in_out else base
    models = [tensor.T if is_in_out else tensor for tensor in finetuned]
    base_norm = torch.norm(theta_0, p=2, dim=0)
    norms = [torch.norm(tensor, p=2, dim=0) for tensor in models]
    magnitude = torch.stack([(norm - base_norm).abs() for norm in norms])
    direction = torch.stack(
        [
            1 - torch.cosine_similarity(tensor / norm, theta_0 / base_norm, dim=0)
            for tensor, norm in zip(models, norms, strict=True)
        ]
    )
    coefficients = 0.5 * (score(ranks(magnitude)) + score(ranks(direction)))
    task_vectors = torch.stack([tensor - theta_0 for tensor in models])
    merged = theta_0 + (task_vectors * coefficients.unsqueeze(1)).sum(dim=0)
    return (merged.T if is_in_out else merged).to(base.dtype).contiguous()


def kernel_spec(*, coefficients: Tensor) -> ColumnWeights | None:
    """Describe a block to the compiled kernel; None unless each column of a matrix has one coefficient."""
    if coefficients.dim() < 3 or coefficients.shape[1] != 1:
        return None
    return ColumnWeights(coefficients.flatten(1))


METHOD = Method(merge_block=widen, tensor_statistics=tensor_statistics, kernel_spec=kernel_spec, reference=reference)
